"""Say what a safetensors file is: method, family, format, rank, norms, metadata, problems."""

import argparse
import json
import math
import shutil
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path

from finetune.artifact import MEASURED, weights_of
from finetune.commands import _bars
from finetune.errors import FinetuneError
from finetune.formats._configs import beside
from finetune.formats._identify import identify
from finetune.header import read_header

LONGEST_VALUE = 2000  # characters of one metadata value on the screen; --json has them all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = ("Of a LoRA, LoHa, LoKr or difference the tensors are read and measured; of other files, "
                     "and with --header, only the header.")
    parser.add_argument("file", type=Path, help="a .safetensors file")
    parser.add_argument("--header", action="store_true", help="read no tensors: at once, and without torch, but no norms")
    parser.add_argument("--keys", action="store_true", help="list every tensor with its type and shape")
    parser.add_argument("--json", action="store_true", help="print everything, also each layer's norm, as one JSON object")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw the norms as a picture")


def run(args: argparse.Namespace) -> int:
    """Print what the file is. FinetuneError for a damaged file, and for a plot of what has no norms."""
    facts = describe(args.file)
    if facts["kind"] in MEASURED and not args.header:
        from finetune.train.norms import measure        # it imports torch

        facts |= measure(args.file, facts)
    if args.plot:
        if not facts.get("norms"):
            why = "; ".join(facts["problems"]) or f"kind {facts['kind'] or 'unknown'}" + " with --header" * args.header
            raise FinetuneError(f"--plot {args.plot}: there are no norms to draw: {why}")
        from finetune.train.norms import block_of

        layers = {block: [] for block in facts["norms"]}
        for layer, norm in facts["layers"].items():
            layers[block_of(layer)].append(norm)
        _bars.draw(args.plot, f"{args.file.name}: norm of the change at strength 1, by block", facts["norms"], layers)
    print(json.dumps(facts, indent=2, ensure_ascii=False) if args.json else table(facts, args.keys))
    return 0


def describe(path: Path) -> dict:
    """Everything that the header of a file says, and peft's config beside it; torch is not imported."""
    path = weights_of(path)
    header = read_header(path)
    try:
        facts = identify(replace(header, metadata=header.metadata | beside(path, header)))
    except FinetuneError as error:
        raise FinetuneError(f"{path}: {error}") from error
    return {
        "file": str(path),
        **facts,
        "tensors": len(header.tensors),
        "parameters": sum(math.prod(shape) for _, shape in header.tensors.values()),
        "dtypes": dict(Counter(dtype for dtype, _ in header.tensors.values()).most_common()),
        "bytes": path.stat().st_size,
        "metadata": dict(sorted(header.metadata.items())),
        "problems": odd_alphas(facts),
        "keys": {name: f"{dtype} {list(shape)}" for name, (dtype, shape) in sorted(header.tensors.items())},
    }


def odd_alphas(facts: dict) -> list[str]:
    """What is wrong with the alphas that the header says; those of a LoKr are no scales."""
    most = 16 * max(facts["ranks"], default=0)
    odd = [alpha for alpha in facts["alphas"] if not 0 < alpha <= most]
    return [f"odd alpha: {_list(odd)}, with ranks up to {most // 16}"] if odd and most else []


def table(facts: dict, keys: bool = False) -> str:
    """The facts for people, in the width of the terminal."""
    width = min(shutil.get_terminal_size((80, 24)).columns, 100)
    modules = [f"{count} in {part}" for part, count in facts["modules"].items()]
    dtypes = [f"{dtype} ({count})" for dtype, count in facts["dtypes"].items()]
    no_alpha = "not given: equal to the rank" if facts["kind"] == "lora" else ""
    rows = {
        "file": facts["file"],
        "kind": facts["kind"] or "unknown",
        "family": facts["family"] or "unknown",
        "format": facts["format"] or "unknown",
        "rank": _list(facts["ranks"]),
        "alpha": _list(facts["alphas"]) or no_alpha,
        "modules": ", ".join(modules),
        "tensors": f"{facts['tensors']}, {facts['parameters']:,} numbers, {', '.join(dtypes)}",
        "size": f"{facts['bytes']:,} bytes",
    }
    lines = [line for name, value in rows.items() if value for line in _row(name, value, 10, width)]
    lines += [line for problem in facts["problems"] for line in _row("problem", _shown(problem), 10, width)]
    if facts.get("norms"):
        lines += ["", "norm of the change, by block", *_bars.text(facts["norms"], width)]
    if keys:
        lines += ["", "keys", *(f"  {_shown(name)}  {what}" for name, what in facts["keys"].items())]
    lines += ["", "metadata" if facts["metadata"] else "no metadata"]
    column = 2 + max((len(key) for key in facts["metadata"] if len(key) < 32), default=0)
    for key, value in facts["metadata"].items():
        lines += [f"  {line}" for line in _row(_shown(key), _shown(value), column, width - 2)]
    return "\n".join(lines)


def _list(values: list[float]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:8])
    return f"{shown}, … ({len(values)} values)" if len(values) > 8 else shown


def _shown(value: str) -> str:
    """A value as a terminal may have it: nothing in it can steer the terminal, and its length is bounded."""
    value = "".join(char if char.isprintable() or char == "\n" else "�" for char in value.expandtabs(4))
    most = 60 if value.startswith("data:") else LONGEST_VALUE      # of a picture, in letters
    if len(value) > most:
        return f"{value[:most]}… ({len(value):,} characters: --json shows all)"
    return value


def _row(name: str, value: str, column: int, width: int) -> list[str]:
    """`name  value` with the value from `column` on, or below the name when it does not fit there."""
    if "\n" not in value and column + len(value) <= width and len(name) < column:
        return [f"{name:<{column}}{value}"]
    wrap = textwrap.TextWrapper(width - 4, drop_whitespace=False, replace_whitespace=False).wrap
    return [name, *(f"    {piece}" for line in value.splitlines() for piece in wrap(line) or [""])]
