"""Merge adapters into a base, as a diffusers folder or a single file."""

from pathlib import Path


def add_arguments(parser) -> None:
    parser.add_argument("--base", required=True, help="`tiny`, a diffusers folder, a .safetensors file or a hub id")
    parser.add_argument("--family", default="sd1")
    parser.add_argument("--revision", help="of a hub model")
    parser.add_argument("--variant", help="of the weight files, such as fp16")
    parser.add_argument("--adapter", action="append", required=True, metavar="FILE[:STRENGTH]", help="can be repeated")
    parser.add_argument("--dtype", default="float16", help="of the written weights: float32, bfloat16 or float16")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="what does not exist yet: a diffusers folder, or a file, NAME.safetensors, in the original naming")


def run(args) -> int:
    import torch

    from finetune import registry
    from finetune.commands.sample import dtype, load, make, parse_adapter
    from finetune.errors import FinetuneError
    from finetune.families import base as families
    from finetune.formats import single_file

    if args.out.exists():
        raise FinetuneError(f"--out {args.out}: is there already; it is not overwritten")
    target, adapters = dtype(args.dtype), [parse_adapter(text) for text in args.adapter]
    # In float32, whatever is written: rounded once, at the end.
    family = registry.find("families", args.family).load(args.base, torch.float32, args.revision, args.variant)
    families.merge(family.parts, [(load(path, family.spec), strength) for path, strength in adapters])
    overflow = [part for part, module in family.parts.items()
                if not all(p.to(target).isfinite().all() for p in module.parameters())]
    if overflow:
        raise FinetuneError(f"merged weights of {', '.join(overflow)} are not finite in {args.dtype}; use --dtype float32")
    make(args.out.parent)
    if args.out.suffix == ".safetensors":
        single_file.write(family, args.out, target, {"modelspec.title": args.out.stem})
    else:
        families.write(family, args.out, target)
    print(f"{args.out}: {family.source.name} + " + " + ".join(f"{strength:g} × {path.name}" for path, strength in adapters))
    return 0
