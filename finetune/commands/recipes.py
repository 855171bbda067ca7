"""List the recipes that come with the toolkit, or copy one to start from."""

from pathlib import Path

from finetune.errors import FinetuneError
from finetune.terminal import folded


def add_arguments(parser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions (none: list)")
    copy = actions.add_parser("copy", help="copy a recipe; an existing file is never overwritten")
    copy.add_argument("name", metavar="NAME", help="a recipe from the list")
    copy.add_argument("--to", type=Path, metavar="PATH", help="a file or a folder; NAME.yaml here by default")


def run(args) -> int:
    """List or copy. FinetuneError for an unknown name and for a target that exists or cannot be written."""
    from finetune.recipe import shipped

    if args.action == "copy":
        print(copy_to(shipped.find(args.name), args.to))
        return 0
    for path in shipped.paths():
        command, *about = shipped.header(path)      # the command is there to be copied, and so is not broken
        print(f"{path.stem}\n    {command}\n{folded(chr(10).join(f'    {line}' for line in about), 4)}")
    return 0


def copy_to(recipe: Path, to: Path | None) -> Path:
    target = to or Path(recipe.name)
    if target.is_dir():
        target = target / recipe.name
    try:
        with open(target, "xb") as file:
            file.write(recipe.read_bytes())
    except FileExistsError:
        raise FinetuneError(f"{target}: exists and is not overwritten; choose another with --to") from None
    return target
