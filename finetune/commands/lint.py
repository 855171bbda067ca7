"""Say what is wrong or odd about a recipe's data, before a second is spent on training."""

import json
import sys
from dataclasses import asdict
from itertools import groupby

from finetune.commands._base import recipe_arguments
from finetune.terminal import folded

SHOWN = 5       # notes of one kind on the screen; --json has them all


def add_arguments(parser) -> None:
    recipe_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(args) -> int:
    """Print what was found: 0 is nothing, 1 only warnings, 2 what training would refuse."""

    from finetune.recipe import load

    recipe = load(args.recipe, args.overrides).recipe
    from finetune.train.lint import lint      # after the recipe is sound: it imports torch

    report = lint(recipe, lambda line: print(line, file=sys.stderr))
    print(json.dumps(asdict(report) | {"code": report.code}, indent=2, ensure_ascii=False) if args.json else table(report))
    return report.code


def table(report) -> str:
    roles = {"learn": "learned", "validation": "held out", "class": "of the class"}
    lines = ["pictures  " + ", ".join(f"{count:,} {roles[role]}" for role, count in report.pictures.items())]
    if plan := report.plan:
        seen = "; ".join(f"{path}: {times:.3g} times" for path, times in plan["seen"])
        lines += [f"plan      {plan['steps']} steps of {plan['size']}, an epoch is {plan['epoch']}", f"seen      {seen}"]
        if "trigger" in plan:
            lines.append(f"trigger   {plan['trigger']:,} captions have it, the others get it put first")
    if report.buckets:
        head = ("size", "pictures", "steps", "in the last")
        rows = [(f"{b['width']} × {b['height']}", *(f"{b[name]:,}" for name in ("pictures", "steps", "last")))
                for b in report.buckets]
        lines += ["", *aligned([head, *rows], numbers=True)]
    order = sorted(report.notes, key=lambda note: not note.fatal)
    for fatal, same in groupby(order, key=lambda note: note.fatal):
        lines += ["", "errors" if fatal else "warnings"]
        by_kind: dict[str, list] = {}
        for note in same:
            by_kind.setdefault(note.kind, []).append(note)
        rows = []
        for kind, notes in by_kind.items():
            rows += [(kind if not n else "", note.name, note.text) for n, note in enumerate(notes[:SHOWN])]
            rows += [("", f"… and {len(notes) - SHOWN:,} more", "")] if len(notes) > SHOWN else []
        lines += [f"  {line}" for line in aligned(rows)]
    lines += ["", *(f"not checked: {what}" for what in report.undone)] if report.undone else []
    refused, total = sum(note.fatal for note in report.notes), len(report.notes)
    counts = {"error": refused, "warning": total - refused}
    words = [f"{count:,} {word}{'s' * (count > 1)}" for word, count in counts.items() if count]
    lines += ["", " and ".join(words) + (": it cannot be trained" if refused else "") or "nothing found"]
    return folded("\n".join(lines))


def aligned(rows: list[tuple], numbers: bool = False) -> list[str]:
    """Columns of equal width, but for the last one; `numbers` stand at the right."""
    widths = [min(60, max(len(row[n]) for row in rows)) for n in range(len(rows[0]))]
    align = [">" if numbers and n else "<" for n in range(len(widths))]
    return ["  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths)).rstrip() for row in rows]
