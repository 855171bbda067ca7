"""The recipes that come with the toolkit."""

from pathlib import Path

from finetune.errors import FinetuneError, nearest

PACKAGE = Path(__file__).resolve().parent.parent


def folder() -> Path:
    """`finetune/_recipes` in an installed wheel, `recipes` beside the package in a clone."""
    installed = PACKAGE / "_recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def paths() -> list[Path]:
    return sorted(folder().glob("*.yaml"))


def find(name: str) -> Path:
    """The file of a shipped recipe. FinetuneError with the nearest right name."""
    known = {path.stem: path for path in paths()}
    if name.removesuffix(".yaml") not in known:
        raise FinetuneError(f"unknown recipe {name!r}{nearest(name, known)}\n    recipes: {', '.join(known)}")
    return known[name.removesuffix(".yaml")]


def header(path: Path) -> list[str]:
    """The comment that a recipe opens with: first the command that runs it."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return lines
