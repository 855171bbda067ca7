"""The architecture as a test: who may import whom, and what lies where."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "cli": 7, "__main__": 7,
    "commands": 6,
    "train": 5,
    "methods": 4, "objectives": 4, "formats": 4, "metrics": 4,
    "families": 3, "data": 3,
    "recipe": 2, "diffusion": 2, "optim": 2,
    "registry": 1, "header": 1, "artifact": 1, "change": 1, "lowrank": 1, "tokens": 1, "runfolder": 1, "device": 1,
    "errors": 0, "batch": 0, "disk": 0, "records": 0, "terminal": 0, "__init__": 0,
}
FILES = sorted((ROOT / "finetune").rglob("*.py"))


def names(path: Path) -> set[str]:
    """What is under finetune/ at the top: folders and files."""
    return {child.stem for child in path.iterdir() if child.suffix == ".py" or child.is_dir()}


def imports(source: str) -> Iterator[str]:
    """What a source imports of ours, anywhere in it: `recipe` for `from finetune.recipe.load import load`."""
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        for module in modules:
            if module.startswith("finetune."):
                yield module.split(".")[1]


def trespasses(place: str, source: str) -> list[str]:
    """The imports that a file in `place`, a folder or a file of finetune/, must not have."""
    here = place in names(ROOT / "finetune") and (ROOT / "finetune" / place).is_dir()
    bad = []
    for other in imports(source):
        if other == place or other not in FLOORS:       # `from finetune import __version__`
            continue
        same_folder = not here and not (ROOT / "finetune" / other).is_dir()
        if FLOORS[other] > FLOORS[place] or FLOORS[other] == FLOORS[place] and not same_folder:
            bad.append(other)
    return bad


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    parts = path.relative_to(ROOT / "finetune").parts
    place = parts[0].removesuffix(".py")
    assert place in FLOORS, f"give finetune/{parts[0]} a floor"
    bad = trespasses(place, path.read_text(encoding="utf-8"))
    assert not bad, f"finetune/{place} (floor {FLOORS[place]}) imports {bad}: own folder or lower floors only"


def test_the_check_sees_what_it_must():
    assert trespasses("data", "from finetune.families import sd1") == ["families"]
    assert trespasses("data", "def f():\n    import finetune.train.loop") == ["train"]
    assert trespasses("methods", "from finetune import formats, registry, __version__") == ["formats"]
    assert trespasses("methods", "from finetune.methods.base import Method\nimport finetune.batch") == []


def test_files_are_short():
    for folder in ("finetune", "scripts", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines; make it two ideas"


def test_datasets_is_no_package():
    """`import datasets` must stay the Hugging Face library, whatever the working folder is."""
    assert not list((ROOT / "datasets").rglob("*.py"))
