"""A recipe file and the overrides of the command line → a checked Recipe, and where each word was written."""

import re
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from finetune.errors import FinetuneError, nearest, refuse
from finetune.recipe.document import Document, Key, NotYaml, parse
from finetune.recipe.explain import explain, written
from finetune.recipe.schema import Recipe

AFTER_THE_FILE = sys.maxsize        # problems of overrides are told after those of the file


@dataclass(frozen=True)
class Loaded:
    """A recipe and where its words come from."""

    recipe: Recipe
    path: Path
    text: str                               # as given
    places: dict[Key, tuple[int, str]]      # where a key was written, as (order, text)

    def at(self, key: str) -> str:
        """`recipes/dog.yaml:9` or `--set train.seed=1`: where a dotted key, or what holds it, was written."""
        return _place(self.places, _canonical(tuple(key.split("."))))[1]

    @contextmanager
    def placing(self):
        """Inside, a problem that begins with the name of a field is told with the place where the field was written."""
        try:
            yield
        except FinetuneError as e:
            key = re.match(r"[a-z_]+(\.[a-z_0-9]+)*(?=: )", str(e))
            raise FinetuneError(f"{self.at(key[0])}  {e}" if key else str(e)) from e


def load(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read and check a recipe. `overrides` are `a.b=value`, with values in YAML.

    Raises one FinetuneError with every problem, each with its place: a file that cannot be read or is not
    YAML, a key unknown or written twice, a value of the wrong type, out of range or against another."""
    draft = _Draft.read(Path(path), text := _text(Path(path)))        # once: it may be a pipe
    for override in overrides:
        draft.override(override)
    try:
        recipe = Recipe.model_validate(draft.tree)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            key = written(problem)
            told = problem["type"] == "missing" and any(key[:depth] in draft.noted for depth in range(1, len(key)))
            if problem["type"] != "default_factory_not_called" and not told:    # these only say that another is wrong
                draft.note(key, explain(problem))
    refuse([text for _, text in sorted(draft.problems, key=lambda problem: problem[0])])
    return Loaded(recipe, Path(path), text, draft.places)


@dataclass
class _Draft:
    """A recipe before it is checked. A single method is kept as a list of one, so a key has one meaning."""

    tree: dict
    places: dict[Key, tuple[int, str]]
    problems: list[tuple[int, str]] = field(default_factory=list)
    noted: set[Key] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path, text: str) -> "_Draft":
        try:
            document = parse(text)
        except NotYaml as error:
            raise FinetuneError(f"{path}:{error.line}  {error}") from None
        if document.value is None and not document.problems:
            raise FinetuneError(f"{path}: is empty; a recipe needs base, data and method")
        if not isinstance(document.value, dict):
            raise FinetuneError(f"{path}:{document.lines[()]}  a recipe is a mapping: base, data, method, …")
        draft = cls(document.value, {(): (1, f"{path}:1")})
        draft.take(document, (), lambda line: (line, f"{path}:{line}"))
        return draft

    def take(self, document: Document, prefix: Key, place) -> None:
        """Keep the places and the problems of a text whose value stands at `prefix`."""
        if isinstance(self.tree.get("method"), dict):
            self.tree["method"] = [self.tree["method"]]
        for key, line in document.lines.items():
            if prefix + key:
                self.places[_canonical(prefix + key)] = place(line)
        for key, line, text in document.problems:
            self.note(_canonical(prefix + key), text, place(line))

    def override(self, override: str) -> None:
        """Put one `a.b=value` into the tree."""
        place = (AFTER_THE_FILE, f"--set {override}")
        name, equals, text = override.partition("=")
        key = tuple(name.strip().split("."))
        if not equals or not all(key):
            self.problems.append((AFTER_THE_FILE, f"{place[1]}  write it as --set key.key=value"))
            return
        try:
            document = parse(text)
        except NotYaml as error:
            hint = "a text with YAML's own signs needs quotes inside the shell's: --set 'a.b=\"…\"'"
            self.problems.append((AFTER_THE_FILE, f"{place[1]}  {error}\n    {hint}"))
            return
        if _canonical(key) != key and self.methods > 1:
            self.note(key, "the recipe has several methods; write method.0, method.1, …", place)
            return
        key = _canonical(key)
        if trouble := _put(self.tree, key, document.value):
            self.note(key, trouble, place)
            return
        for stale in [known for known in self.places if known[:len(key)] == key]:
            del self.places[stale]
        for depth in range(1, len(key) + 1):
            self.places.setdefault(key[:depth], place)
        self.take(document, key, lambda line: place)

    @property
    def methods(self) -> int:
        methods = self.tree.get("method")
        return len(methods) if isinstance(methods, list) else 0

    def note(self, key: Key, text: str, place: tuple[int, str] | None = None) -> None:
        """Keep a problem; of several at one key only the first, which causes the others."""
        if key in self.noted:
            return
        self.noted.add(key)
        order, where = place or _place(self.places, key)
        single = key[:2] == ("method", "0") and self.methods == 1
        spoken = ".".join(("method", *key[2:]) if single else key)
        self.problems.append((order, f"{where}  {spoken}: {text}" if spoken else f"{where}  {text}"))


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        others = [str(other) for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise FinetuneError(f"{path}: there is no such recipe{nearest(str(path), others)}\n"
                            "    `finetune recipes` lists the recipes that come with the toolkit") from None
    except IsADirectoryError:
        raise FinetuneError(f"{path}: is a folder; name a recipe file in it") from None
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise FinetuneError(f"{path}:{line}  not UTF-8 text; save the recipe as UTF-8") from None
    except OSError as error:
        raise FinetuneError(f"{path}: cannot be read: {error.strerror}") from None


def _canonical(key: Key) -> Key:
    """`method.rank` is `method.0.rank`."""
    short = len(key) > 1 and key[0] == "method" and not key[1].isdecimal()
    return ("method", "0", *key[1:]) if short else key


def _place(places: dict[Key, tuple[int, str]], key: Key) -> tuple[int, str]:
    """Where a key was written, or the nearest thing around it."""
    while key not in places:
        key = key[:-1]
    return places[key]


def _put(tree: dict, key: Key, value: object) -> str | None:
    """Set a value inside nested mappings and lists. Returns what stands in the way."""
    here: object = tree
    for depth, name in enumerate(key):
        last = depth == len(key) - 1
        if isinstance(here, list):
            if not name.isdecimal() or int(name) >= len(here):
                return f"{'.'.join(key[:depth])} is a list of {len(here)}: name an item from 0 on"
            name = int(name)
        elif not isinstance(here, dict):
            return f"{'.'.join(key[:depth])} is a single value; set it as a whole"
        elif not last and here.get(name) is None:
            here[name] = [{}] if key[depth + 1] == "0" else {}
        if last:
            here[name] = value
        else:
            here = here[name]
    return None
