"""Every main word a user types is the name of a file; this finds the file and imports nothing else.

The one door upward: a lower floor reaches a module of a higher one by its group and name only.
"""

import ast
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

from finetune.errors import FinetuneError, nearest

# folder -> what one of its modules is called
GROUPS = {"commands": "command", "families": "family", "methods": "method", "objectives": "objective",
          "formats": "format", "metrics": "metric"}


def names(group: str) -> list[str]:
    """The words of a group, sorted: the modules of its folder, none of them imported."""
    assert group in GROUPS, f"no group {group!r}"
    found = (module.name for module in pkgutil.iter_modules([str(_folder(group))]))
    return sorted(name for name in found if name != "base" and not name.startswith("_"))


def check(group: str, name: str) -> str:
    """The name itself. FinetuneError with the nearest right word if the group has no such module."""
    known = names(group)
    if name not in known:
        raise FinetuneError(f"unknown {GROUPS[group]} {name!r}{nearest(name, known)}\n"
                            f"    {group}: {', '.join(known)}")
    return name


def find(group: str, name: str) -> ModuleType:
    """Import the module of that name. FinetuneError as in `check`."""
    return importlib.import_module(f"finetune.{group}.{check(group, name)}")


def summary(group: str, name: str) -> str:
    """The first line of a module's docstring, read without importing the module."""
    source = (_folder(group) / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def _folder(group: str) -> Path:
    return Path(__file__).parent / group
