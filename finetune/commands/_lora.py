"""What merge, extract and resize share: how many ranks, the sum of adapters, the file and the error that is said."""

from __future__ import annotations

import json
import re
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import registry
from finetune.artifact import WHOLE, Artifact, modules
from finetune.commands import _base
from finetune.errors import FinetuneError
from finetune.formats._identify import identify
from finetune.formats._tokens import token
from finetune.header import read_header

if TYPE_CHECKING:  # it costs an import of torch
    from finetune.lowrank import Cut, LowRank

# Of these a LoHa does not say whether its weight has a kernel.
KERNEL = re.compile(r"(.*\.)?(conv\w*|proj_in|proj_out)")


def cut_arguments(parser, required: bool) -> None:
    size = parser.add_mutually_exclusive_group(required=required)
    size.add_argument("--rank", type=int, metavar="N", help="of every module, or less where a layer is smaller")
    size.add_argument("--energy", type=float, metavar="E",
                      help="the fewest ranks of each module that keep this share, up to 1, of its squared singular values")
    size.add_argument("--frobenius", type=float, metavar="F", help="the same for the share of its Frobenius norm: E = F²")


def cut(args) -> Cut | None:
    """None when no size is asked for."""
    from finetune.lowrank import Cut

    if args.rank is not None:
        if args.rank < 1:
            raise FinetuneError(f"--rank {args.rank}: at least 1")
        return Cut(args.rank)
    for name, power in (("energy", 1), ("frobenius", 2)):
        if (share := getattr(args, name)) is not None:
            if not 0 < share <= 1:
                raise FinetuneError(f"--{name} {share:g}: a share is needed, above 0 and up to 1")
            return Cut(energy=share ** power)
    return None


def new_file(path: Path) -> None:
    """Raise FinetuneError unless an adapter can be written there, with nothing overwritten."""
    if path.exists():
        raise FinetuneError(f"--out {path}: is there already; it is not overwritten")
    if path.suffix != ".safetensors" or not path.parent.is_dir():
        raise FinetuneError(f"--out {path}: a .safetensors file in an existing folder is needed")


def titled(path: Path) -> dict[str, str]:
    """What a file says that it is called: the name that web UIs know it by."""
    return dict.fromkeys(("ss_output_name", "modelspec.title"), token(path))


def dtype(name: str | None, adapters: list[Artifact]):
    """The one of that name, or the widest of the adapters' own."""
    import torch

    if name:
        return _base.dtype(name)
    own = (t.dtype for adapter in adapters for key, t in adapter.tensors.items() if not key.endswith(".alpha"))
    return reduce(torch.promote_types, own)


def format_of(path: Path) -> str:
    """The format of a LoRA in the way of this file: its own, where we write it."""
    name = identify(read_header(path))["format"]
    able = [known for known in registry.names("formats") if "lora" in registry.find("formats", known).KINDS]
    return name if name in able else "kohya"


def summed(adapters: list[tuple[Path, Artifact, float]], size: Cut | None) -> dict[str, LowRank]:
    """{module: the sum of what the adapters change there, times their strengths}: exactly without a size, if all are LoRAs.

    Raises FinetuneError for what no product can hold or what depends on the base."""
    from finetune.change import core
    from finetune.lowrank import nearest, shrunk, total
    from finetune.train.adapters import check_finite

    by_stem: dict[str, list] = {}
    for path, artifact, strength in adapters:
        if artifact.kind in (*WHOLE, "embedding"):
            raise FinetuneError(f"{path}: is no change of layers but of the kind {artifact.kind}: it stays a file of its own")
        check_finite(path, artifact)
        for (part, name), module in modules(artifact.tensors).items():
            stem = f"{part}.{name}"
            dependent = sorted({"dora_scale", "oft_blocks"} & module.keys())
            if dependent or "hada_w1_a" in module and KERNEL.fullmatch(name):
                why = f"has {dependent[0]}: what it changes" if dependent else "is a LoHa: the kernel of its weight"
                raise FinetuneError(f"{path}: {stem} {why} depends on the base\n    merge it into the base and take the "
                                    "difference: finetune merge --base B --dtype float32 … --out M; finetune extract --base B "
                                    "--tuned M …")
            if "diff_b" in module or "diff" in module and module["diff"].ndim == 1:
                raise FinetuneError(f"{path}: {stem} changes a bias or a norm, which no LoRA can hold\n    "
                                    "merge it into the base: finetune merge --base B …")
            if "lora_A" not in module and size is None:
                raise FinetuneError(f"{path}: {stem} is no LoRA, so its ranks cannot be added up; give --rank N or --energy E")
            by_stem.setdefault(stem, []).append((path, module, strength))
    found = {}
    for stem, own in by_stem.items():
        if all("lora_A" in module for _, module, _ in own):
            shapes = {(len(m["lora_B"]), *m["lora_A"].shape[1:]) for _, m, _ in own}
            if len(shapes) == 1:
                exact = total((module, strength) for _, module, strength in own)
                found[stem] = shrunk(exact, size) if size else exact
        else:
            changes = [strength * core(module) for _, module, strength in own]
            shapes = {tuple(change.shape) for change in changes}
            if len(shapes) == 1:
                found[stem] = nearest(sum(changes), size)
        if len(shapes) > 1:
            files = " and ".join(path.name for path, _, _ in own)
            raise FinetuneError(f"{stem}: {files} are for weights of the shapes {' and '.join(map(str, sorted(shapes)))}: "
                                "they are for different bases")
    if not any(product.norm for product in found.values()):
        raise FinetuneError(f"{' + '.join(f'{strength:g} × {path.name}' for path, _, strength in adapters)} changes nothing; "
                            "nothing is written")
    return found


def said(found: dict[str, LowRank], other: float, path: Path, as_json: bool, table: bool = False) -> str:
    """The error of a written LoRA, overall, of its worst layer and, as a table or as JSON, of every layer."""
    from finetune.lowrank import error

    overall, worst = error(found.values(), other), max(found, key=lambda stem: found[stem].error)
    ranks = sorted({product.rank for product in found.values()})
    rows = {stem: {"rank": product.rank, "norm": product.norm, "error": product.error} for stem, product in found.items()}
    if as_json:
        whole = sum(product.norm ** 2 for product in found.values()) + other
        return json.dumps({"file": str(path), "error": overall, "worst": worst, "ranks": ranks,
                           "other": (other / whole) ** 0.5 if whole else 0.0, "layers": rows}, indent=2)
    lines = []
    if table:
        width = max(map(len, found))
        lines = [f"{'layer':<{width}}  rank       norm   error"]
        lines += [f"{stem:<{width}}  {row['rank']:4d} {row['norm']:10.4g} {row['error']:7.2%}" for stem, row in rows.items()]
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return "\n".join([*lines, f"{path}: {len(found)} modules of rank {span}",
                      f"    error {overall:.3g} of the whole change, by Frobenius norm",
                      f"    at worst {found[worst].error:.3g}, in {worst}"])
