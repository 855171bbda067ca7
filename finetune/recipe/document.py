"""YAML text → plain values, with the place where each one was written.

Built on YAML's node tree instead of a loader: it knows the line of every key, builds no objects from tags,
and lets every problem of a file be found in one go.
"""

from dataclasses import dataclass, field

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

Key = tuple[str, ...]               # ("train", "learning_rate"); items of a list have their number
TAG = "tag:yaml.org,2002:"
SCALARS = ("null", "bool", "int", "float")


class NotYaml(Exception):
    """A text that is not YAML at all: `line` and why."""

    def __init__(self, line: int, why: str):
        super().__init__(why)
        self.line = line


@dataclass(frozen=True)
class Document:
    """The value of a text, the line of every key, and what is wrong with it so far: (key, line, text)."""

    value: object
    lines: dict[Key, int]
    problems: list[tuple[Key, int, str]]


def parse(text: str) -> Document:
    """Read one YAML 1.2 document; an empty one has the value None. Raises NotYaml."""
    yaml = YAML(typ="safe", pure=True)
    reader = _Reader(yaml)
    try:
        node = yaml.compose(text)
        value = None if node is None else reader.value(node, ())
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        why = ", ".join(part for part in (error.problem, error.context) if part)
        raise NotYaml(mark.line + 1, f"not valid YAML at column {mark.column + 1}: {why}") from None
    except YAMLError as error:      # a character that may not stand in YAML
        line = text[:getattr(error, "position", 0)].count("\n") + 1
        raise NotYaml(line, f"not valid YAML: {getattr(error, 'reason', error)}") from None
    except RecursionError:
        raise NotYaml(1, "nested too deeply") from None
    return Document(value, reader.lines, reader.problems)


@dataclass
class _Reader:
    yaml: YAML
    lines: dict[Key, int] = field(default_factory=dict)
    problems: list[tuple[Key, int, str]] = field(default_factory=list)
    seen: list[Node] = field(default_factory=list)

    def value(self, node: Node, key: Key):
        """The plain value of a node. What cannot be read is noted, and is None."""
        line = self.lines.setdefault(key, node.start_mark.line + 1)
        tag = node.tag.removeprefix(TAG)
        # A second visit means an alias: refused, because aliases can nest without end.
        if any(node is other for other in self.seen):
            self.problems.append((key, line, "an alias cannot stand in a recipe; write the value out"))
            return None
        self.seen.append(node)
        if isinstance(node, MappingNode) and tag == "map":
            return self.mapping(node, key)
        if isinstance(node, SequenceNode) and tag == "seq":
            return [self.value(item, (*key, str(i))) for i, item in enumerate(node.value)]
        if isinstance(node, ScalarNode) and tag in ("str", "timestamp"):
            return node.value       # 2024-01-01 is a fine name for a folder
        if isinstance(node, ScalarNode) and tag in SCALARS:
            try:
                return self.yaml.constructor.construct_object(node)
            except (ValueError, LookupError):
                self.problems.append((key, line, f"{node.value[:40]!r} cannot be read as {tag}"))
                return None
        self.problems.append((key, line, f"the tag {node.tag} cannot stand in a recipe; leave it out"))
        return None

    def mapping(self, node: MappingNode, parent: Key) -> dict[str, object]:
        values: dict[str, object] = {}
        for name, node_of_value in node.value:
            line = name.start_mark.line + 1
            if not isinstance(name, ScalarNode):
                self.problems.append((parent, line, "a key is one word; a text with braces needs quotes"))
                continue
            key = (*parent, name.value)
            if name.value in values:
                self.problems.append((key, line, f"written twice; the first is in line {self.lines[key]}"))
                continue
            self.lines[key] = line
            values[name.value] = self.value(node_of_value, key)
        return values
