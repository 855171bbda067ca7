"""A folder of pictures with captions → examples that can all be used.

The imagefolder convention: `metadata.jsonl` with `file_name`, `text` and any other columns, or a `.txt` / `.caption`
file beside each picture."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from finetune.data.captions import fields
from finetune.data.pixels import SUFFIXES, UnreadablePicture, read
from finetune.errors import FinetuneError

SIDECARS = (".txt", ".caption")


@dataclass(frozen=True)
class Example:
    file: Path
    columns: dict[str, str]     # `text` is the caption
    digest: str                 # SHA-256 of the file's bytes
    width: int                  # of the upright picture, pixels
    height: int


def scan(folder: str, template: str) -> list[Example]:
    """Every picture of the folder, in the order of their names.

    Raises FinetuneError with all that stands in the way: an empty folder, a picture that cannot be decoded, a column
    that the caption template names and an example lacks."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FinetuneError(f"data.images: there is no folder {root}")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES
                   and not any(part.startswith(".") for part in p.relative_to(root).parts))
    if not files:
        raise FinetuneError(f"data.images: {root} holds no pictures ({', '.join(SUFFIXES)})")
    problems: list[str] = []
    rows = metadata(root, set(files), problems)
    examples = []
    for file in files:
        columns = rows.get(file) or sidecar(file, problems)
        missing = [name for name in fields(template) if not columns.get(name, "").strip()]
        if missing == ["text"]:
            problems.append(f"{file}: no caption; write one into {file.with_suffix('.txt').name}, into metadata.jsonl, or "
                            "set data.caption.template to a text without {text}")
        elif missing:
            problems.append(f"{file}: no column {', '.join(missing)} in metadata.jsonl, but data.caption.template needs it")
        try:
            picture = read(file)
        except UnreadablePicture as e:
            problems.append(str(e))
        else:
            examples.append(Example(file, columns, hashlib.sha256(file.read_bytes()).hexdigest(),
                                    picture.width, picture.height))
    if problems:
        shown = problems[:20] + ([f"… and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise FinetuneError("\n".join([f"data.images: {root}", *(f"    {p}" for p in shown)]))
    return examples


def metadata(root: Path, pictures: set[Path], problems: list[str]) -> dict[Path, dict[str, str]]:
    """The rows of every metadata.jsonl below `root` by picture; what is wrong with them is added to `problems`."""
    rows: dict[Path, dict[str, str]] = {}
    for table in sorted(root.rglob("metadata.jsonl")):
        if any(part.startswith(".") for part in table.relative_to(root).parts):
            continue
        # no splitlines: it also cuts at characters that may stand in a JSON string
        for number, line in enumerate(text(table, problems).split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = {str(k): str(v) for k, v in json.loads(line).items() if v is not None}
                file = table.parent / row.pop("file_name")
            except (ValueError, AttributeError, KeyError):
                problems.append(f"{table}:{number}: not an object with a file_name")
                continue
            if not file.is_file():
                problems.append(f"{table}:{number}: there is no {file.name}")
            elif file not in pictures:
                problems.append(f"{table}:{number}: {file.name} is none of the pictures here ({', '.join(SUFFIXES)})")
            elif file in rows:
                problems.append(f"{table}:{number}: a second row for {file.name}")
            rows[file] = row
    return rows


def sidecar(file: Path, problems: list[str]) -> dict[str, str]:
    """The caption beside the picture."""
    for suffix in SIDECARS:
        if (beside := file.with_suffix(suffix)).is_file():
            return {"text": " ".join(text(beside, problems).split())}
    return {}


def text(file: Path, problems: list[str]) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        problems.append(f"{file}: is not UTF-8 (byte {e.start}); save it as UTF-8")
        return ""


def fingerprint(examples: list[Example]) -> str:
    """What the data is, whatever the folder is called: a hash of every picture's content and columns."""
    whole = hashlib.sha256()
    for example in examples:
        whole.update(json.dumps([example.digest, example.columns], sort_keys=True).encode())
    return whole.hexdigest()
