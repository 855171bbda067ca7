"""The words for layers: groups of the family and patterns, resolved to the paths of modules."""

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from finetune.artifact import published
from finetune.errors import FinetuneError
from finetune.families._altered import unused

ADAPTED = (nn.Linear, nn.Conv2d)
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Part:
    """What words are resolved in."""

    name: str                               # "sd1.denoiser"
    module: nn.Module
    groups: dict[str, tuple[str, ...]]      # group -> patterns


def resolve(targets: list[str], part: Part, field: str) -> list[str]:
    """The paths of the modules that the targets name, sorted. A target is a group of the family, or a pattern with `*`
    that has to fit a module's whole path or the end of it. Raises FinetuneError for one that names nothing."""
    groups = part.groups
    idle = unused(part.module)
    modules = {path: m for path, m in part.module.named_modules() if path and not path.startswith(idle)}
    paths = [path for path, m in modules.items() if isinstance(m, ADAPTED)]
    others = modules.keys() - set(paths)

    def fitting(pattern: str, among) -> set[str]:
        return {path for path in among if any(fnmatchcase(name, p) for name in (path, published(path))
                                              for p in (pattern, f"*.{pattern}"))}

    chosen: set[str] = set()
    for target in targets:
        found = [fitting(pattern, paths) for pattern in groups.get(target, (target,))]
        if not all(found):
            if unfit := fitting(target, others):
                what = type(part.module.get_submodule(sorted(unfit)[0])).__name__
                why = f"names {len(unfit)} modules ({what}), none of them a Linear or Conv2d; add `.*` for what is inside"
            else:
                last = {name: sum(p == name or p.endswith(f".{name}") for p in paths)
                        for p in paths for name in [p.rsplit(".", 1)[-1]] if not name.isdigit()}
                near = difflib.get_close_matches(target, [*groups, *last], 1, 0.4)
                why = f"matches no module of {part.name}"
                if near:
                    why += f"\n    nearest: {near[0]!r}" + (f" ({last[near[0]]} modules)" if near[0] in last else "")
                why += f"\n    groups: {', '.join(groups)}"
            raise FinetuneError(f"{field}: {target!r} {why}")
        chosen.update(*found)
    return sorted(chosen)


def override(default: Number | None, words: dict[str, Number], chosen: list[str], part: Part,
             field: str) -> dict[str, Number | None]:
    """{path: number} for the chosen paths: the default, or what the one word that fits has beside it. Raises FinetuneError
    for a word that fits none of them, and for two that disagree."""
    given: dict[str, tuple[str, Number]] = {}
    for word, value in words.items():
        paths = set(resolve([word], part, field)) & set(chosen)
        if not paths:
            raise FinetuneError(f"{field}: {word!r} names none of the {len(chosen)} targets")
        for path in sorted(paths):
            other, earlier = given.setdefault(path, (word, value))
            if earlier != value:
                raise FinetuneError(f"{field}: {other!r} and {word!r} both name {path}, with {earlier:g} and {value:g}")
    return {path: given[path][1] if path in given else default for path in chosen}
