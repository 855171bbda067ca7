"""Merge adapters into a base, as a diffusers folder or a single file."""

from pathlib import Path

from finetune.commands import _base


def add_arguments(parser) -> None:
    _base.add_arguments(parser)
    parser.add_argument("--adapter", action="append", required=True, metavar="FILE[:STRENGTH]", help="can be repeated")
    parser.add_argument("--dtype", default="float16", help="of the written weights: float32, bfloat16 or float16")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", 
                        help="a folder that does not exist yet, or a .safetensors file in the original naming, which every tool reads")


def run(args) -> int:
    import torch

    from finetune.errors import FinetuneError
    from finetune.families import base as families
    from finetune.formats import base as formats
    from finetune.formats import single_file
    from finetune.train.adapters import named

    if args.out.exists():
        raise FinetuneError(f"--out {args.out}: is there already; it is not overwritten")
    target, adapters = _base.dtype(args.dtype), [named(text) for text in args.adapter]
    # In float32, whatever is written: rounded once, at the end.
    family = _base.load(args, torch.float32)
    families.merge(family.parts, [(formats.load(path, family.spec), strength) for path, strength in adapters])
    overflow = [part for part, module in family.parts.items()
                if not all(p.to(target).isfinite().all() for p in module.parameters())]
    if overflow:
        raise FinetuneError(f"merged weights of {', '.join(overflow)} are not finite in {args.dtype}; use --dtype float32")
    _base.make(args.out.parent)
    if args.out.suffix == ".safetensors":
        single_file.write(family, args.out, target, {"modelspec.title": args.out.stem})
    else:
        families.write(family, args.out, target)
    print(f"{args.out}: {family.source.name} + " + " + ".join(f"{strength:g} × {path.name}" for path, strength in adapters))
    return 0
