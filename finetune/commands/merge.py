"""Merge adapters into a base, or without a base into one adapter."""

from dataclasses import replace
from pathlib import Path

from finetune import registry
from finetune.artifact import Artifact, modules
from finetune.commands import _base, _lora
from finetune.errors import FinetuneError
from finetune.formats import base as formats
from finetune.formats import single_file
from finetune.formats._identify import identify
from finetune.header import read_header


def add_arguments(parser) -> None:
    _base.add_arguments(parser, "; without it the adapters become one adapter")
    parser.add_argument("--adapter", action="append", required=True, metavar="FILE[:STRENGTH]", help="can be repeated")
    parser.add_argument("--dtype", help="of the written weights: float32, bfloat16 or float16; if not given, "
                                        "float16 for a model and the widest of the adapters' own for an adapter")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH",
                        help="a folder that does not exist yet, or a .safetensors file in the original naming, which every "
                             "tool reads; of an adapter a .safetensors file")
    one = parser.add_argument_group("several adapters into one", "Without --base. LoRAs are added up exactly, and their ranks "
                                    "with them; with a size, as near as that allows, and the error is said.")
    _lora.cut_arguments(one, required=False)
    one.add_argument("--json", action="store_true", help="print the error of every module, as JSON")


def run(args) -> int:
    from finetune.train.adapters import named

    size, adapters = _lora.cut(args), [named(text) for text in args.adapter]
    _base.changes(args)
    if args.base and (size or args.json):
        raise FinetuneError("--rank, --energy, --frobenius and --json are for several adapters into one, without --base")
    return into_base(args, adapters) if args.base else into_one(args, adapters, size)


def into_base(args, adapters: list[tuple[Path, float]]) -> int:
    import torch

    from finetune.families import base as families
    from finetune.train.adapters import check_finite

    if args.out.exists():
        raise FinetuneError(f"--out {args.out}: is there already; it is not overwritten")
    args.dtype = args.dtype or "float16"
    target = _base.dtype(args.dtype)
    # In float32, whatever is written: rounded once, at the end.
    family = _base.load(args, torch.float32)
    loaded = [(formats.load(path, family.spec), strength) for path, strength in adapters]
    for (path, _), (artifact, _) in zip(adapters, loaded):
        check_finite(path, artifact)
    if any(artifact.kind == "control" or families.misfits(family.parts, artifact) for artifact, _ in loaded):
        families.merge(family.parts, loaded)        # says all that does not fit
    overflow, pieces = [], by_module(loaded)
    # Module by module, because all at once would need the model three times, as it was and the sums; and part by part, because
    # a part is mapped from its file until the last of its weights is cast, and the parts that follow are not in memory yet.
    for part, module in family.parts.items():
        for (own, _), piece in pieces.items():
            if own == part:
                families.merge(family.parts, piece)
        if not all(p.isfinite().all() for p in module.to(target).parameters()):
            overflow.append(part)
    if overflow:
        raise FinetuneError(f"merged weights of {', '.join(overflow)} are not finite in {args.dtype}; use --dtype float32")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out.suffix == ".safetensors":
        single_file.write(family, args.out, target, {"modelspec.title": args.out.stem})
    else:
        families.write(family, args.out, target)
    print(f"{args.out}: {family.source.name} + {_sum(adapters)}")
    return 0


def by_module(adapters: list) -> dict[tuple[str, str], list]:
    """{(part, module path): the adapters, each with no more than what it changes there}"""
    pieces: dict[tuple, list] = {}
    for artifact, strength in adapters:
        for (part, path), roles in modules(artifact.tensors).items():
            own = {".".join(filter(None, (part, path, role))): tensor for role, tensor in roles.items()}
            pieces.setdefault((part, path), []).append((replace(artifact, tensors=own), strength))
    return pieces


def into_one(args, adapters: list[tuple[Path, float]], size) -> int:
    from finetune.lowrank import packed

    _lora.new_file(args.out)
    families = {path: identify(read_header(path))["family"] or args.family for path, _ in adapters}
    if len(set(families.values())) > 1:
        said = ", ".join(f"{path.name} is for {family}" for path, family in families.items())
        raise FinetuneError(f"--adapter: {said}; only adapters of one family can become one")
    spec = registry.find("families", families[adapters[0][0]]).SPEC
    loaded = [(path, formats.load(path, spec), strength) for path, strength in adapters]
    found = _lora.summed(loaded, size)
    tensors, found = packed(found, _lora.dtype(args.dtype, [artifact for _, artifact, _ in loaded]))
    metadata = _lora.titled(args.out) | {"finetune.merged": _sum(adapters)}
    bases = {artifact.metadata.get("ss_sd_model_name") for _, artifact, _ in loaded}
    if len(bases) == 1 and None not in bases:
        metadata["ss_sd_model_name"] = bases.pop()
    formats.save(Artifact("lora", spec.name, tensors, metadata), args.out, _lora.format_of(adapters[0][0]), spec)
    print(_lora.said(found, 0.0, args.out, args.json))
    return 0


def _sum(adapters: list[tuple[Path, float]]) -> str:
    return " + ".join(f"{strength:g} × {path.name}" for path, strength in adapters)
