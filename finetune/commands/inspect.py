"""Say what a safetensors file is: method, family, format, rank, alpha, keys, metadata."""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import textwrap
from collections import Counter
from pathlib import Path

from finetune import registry
from finetune.artifact import modules, read_header
from finetune.errors import FinetuneError
from finetune.formats.base import identify, load

LONGEST_VALUE = 2000  # characters of one metadata value on the screen; --json has them all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("file", type=Path, help="a .safetensors file; only its header is read")
    parser.add_argument("--keys", action="store_true", help="list every tensor with its type and shape")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.add_argument("--norms", action="store_true", help="read the tensors too: change by block")


def run(args: argparse.Namespace) -> int:
    """Print what the file is. FinetuneError for a damaged file and, for norms, for one whose change depends on its base."""
    facts = describe(args.file)
    if args.norms:
        facts["norms"] = norms(args.file, facts["family"])
    print(json.dumps(facts, indent=2, ensure_ascii=False) if args.json else table(facts, args.keys))
    return 0


def describe(path: Path) -> dict:
    """Everything the header of a file says; torch is not imported."""
    header = read_header(path)
    try:
        facts = identify(header)
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
        "keys": {name: f"{dtype} {list(shape)}" for name, (dtype, shape) in sorted(header.tensors.items())},
    }


def norms(path: Path, family: str | None) -> dict[str, float]:
    """{block: Frobenius norm of the change that the adapter makes there at strength 1}."""
    if family is None:
        raise FinetuneError(f"{path}: is of an unknown family, so --norms cannot read its tensors")
    from finetune.change import core

    squares: dict[str, float] = {}
    for (part, name), module in modules(load(path, registry.find("families", family).SPEC).tensors).items():
        if found := sorted({"dora_scale", "oft_blocks"} & module.keys()):
            raise FinetuneError(f"{path}: has {found[0]}, so what it changes depends on the base; --norms has none")
        block = f"{part}.{re.match(r'.*?[.][0-9]+|.*', name)[0]}"
        squares[block] = squares.get(block, 0.0) + core(module).double().square().sum().item()
    return {block: math.sqrt(square) for block, square in squares.items()}


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
    if facts.get("norms"):
        lines += ["", "norm of the change, by block"]
        longest = max(map(len, facts["norms"]))
        lines += [f"  {block:<{longest}}  {norm:10.4f}" for block, norm in facts["norms"].items()]
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
    if len(value) > LONGEST_VALUE:
        return f"{value[:LONGEST_VALUE]}… ({len(value):,} characters: --json shows all)"
    return value


def _row(name: str, value: str, column: int, width: int) -> list[str]:
    """`name  value` with the value from `column` on, or below the name when it does not fit there."""
    if "\n" not in value and column + len(value) <= width and len(name) < column:
        return [f"{name:<{column}}{value}"]
    wrap = textwrap.TextWrapper(width - 4, drop_whitespace=False, replace_whitespace=False).wrap
    return [name, *(f"    {piece}" for line in value.splitlines() for piece in wrap(line) or [""])]
