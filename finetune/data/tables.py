"""What is written beside pictures: tables with a row for each, and a `.txt` or `.caption` of the same name.

Columns are text to the end: a number, a truth value or a list of a table stands there as JSON."""

import csv
import json
import os
import posixpath
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from finetune.data.memory import Found, Memory, chosen, find, key, portions
from finetune.data.pictures import SUFFIXES

MAX_CHARACTERS = 50_000     # of what a caption is made of: a hundred times what encoders read, and some 0.1 s of a tokenizer
TEXT_BYTES = 2**21          # of a sidecar, or of a line of a table: longer ones are not read
SIDECARS = (".txt", ".caption")         # the first that is there counts
NOTHING = b"{}"
TO_JSON = json.JSONEncoder(ensure_ascii=False, sort_keys=True, default=str).encode
ODD = re.compile(rb"(^|/)(\.{0,2}/|$)")           # in a name that another name leads to the same file
ROW = pa.schema([("name", pa.large_binary()), ("line", pa.int64()), ("columns", pa.large_binary())])
TEXT = pa.schema([("columns", pa.large_binary()), ("reason", pa.large_string())])


@dataclass(frozen=True)
class Note:
    """What is wrong or odd about a file."""

    kind: str       # unreadable, table, text, member, mask; sidecar, suffix
    name: str
    text: str
    fatal: bool = True


def printable(name: bytes | str) -> str:
    """A file's name as any terminal can show it."""
    name = os.fsdecode(name)
    return name if name.isprintable() else "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def columns(row: dict) -> bytes:
    """A row as JSON; what is empty is not there. Raises ValueError for text that is no Unicode."""
    kept = {}
    for name, value in row.items():
        if value is not None and value == value:        # tables write NaN for nothing
            text = value if isinstance(value, str) else TO_JSON(value)
            if text and not text.isspace():
                kept[str(name)] = text
    return TO_JSON(kept).encode()


def sidecar(data: bytes) -> dict:
    """The columns that a `.txt` gives. Raises UnicodeDecodeError."""
    return {"text": " ".join(data.decode("utf-8-sig").split())}


def whole(path: str | bytes, most: int) -> bytes:
    """A file's bytes. Raises OSError for more than `most`: such a one is not read at all."""
    with open(path, "rb", buffering=0) as file:
        fits(os.fstat(file.fileno()).st_size, most)
        return file.readall()


def fits(size: int, most: int) -> None:
    if size > most:
        raise OSError(0, f"{size:,} bytes are more than the {most:,} that are read")


def not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 (byte {error.start}); save it as UTF-8"


def read_table(prefix: str, root: bytes, name: bytes, stat: list[int], memory: Memory) -> tuple[pa.Table, list[Note]]:
    """The rows of `metadata.*`, by the picture's name under the root, and what is wrong with it."""
    shown, path = printable(prefix + os.fsdecode(name)), os.path.join(root, name)
    place = key("table", os.fsdecode(os.path.abspath(path)), shown)
    known, notes = memory.once("table", place, repr(stat), partial(rows_of, path, posixpath.dirname(name), shown))
    return known, [Note(**note) for note in notes]


def rows_of(table: bytes, folder: bytes, shown: str) -> tuple[pa.Table, list[dict]]:
    names, lines, texts, notes = [], [], [], []
    try:
        for line, row in READERS[os.path.splitext(table)[1].decode().lower()](table):
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                notes.append(Note("table", f"{shown}:{line}", "not an object with a file_name"))
                continue
            try:
                file = row.pop("file_name").encode()
                texts.append(columns(row))
            except UnicodeEncodeError:
                notes.append(Note("table", f"{shown}:{line}", "holds half of a surrogate pair, which is no text"))
            else:
                path = posixpath.join(folder, file)
                names.append(posixpath.normpath(path) if ODD.search(path) else path)
                lines.append(line)
    except Broken as e:
        notes.append(Note("table", f"{shown}:{e.line}" if e.line else shown, str(e)))
    known = pa.table([names, lines, texts], schema=ROW).replace_schema_metadata({"shown": shown})
    return known, [vars(note) for note in notes]


class Broken(Exception):
    """The rest of a table cannot be read."""

    def __init__(self, line: int, reason: str):
        super().__init__(reason)
        self.line = line


def lines(file) -> Iterator[bytes]:
    number = 0
    while line := file.readline(TEXT_BYTES + 1):
        number += 1
        if len(line) > TEXT_BYTES:
            raise Broken(number, f"is a line of more than {TEXT_BYTES:,} bytes")
        yield line


def read_jsonl(path: bytes) -> Iterator[tuple[int, object]]:
    with opened(path) as file:
        for number, line in enumerate(lines(file), 1):
            try:
                line = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as e:
                raise Broken(number, not_utf8(e)) from None
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError):
                    yield number, None


def read_csv(path: bytes) -> Iterator[tuple[int, object]]:
    with opened(path) as file:
        text = (line.decode("utf-8-sig" if not n else "utf-8") for n, line in enumerate(lines(file)))
        reader = csv.reader(text, strict=True)
        try:
            header = next(reader, [])
            if "file_name" not in header:
                raise Broken(1, "has no column file_name")
            for row in reader:
                if len(row) not in (0, len(header)):
                    raise Broken(reader.line_num, f"has {len(row)} fields where the first line has {len(header)}")
                if row:
                    yield reader.line_num, dict(zip(header, row))
        except UnicodeDecodeError as e:
            raise Broken(reader.line_num + 1, not_utf8(e)) from None
        except csv.Error as e:
            raise Broken(reader.line_num, f"is no CSV: {e}") from None


def read_parquet(path: bytes) -> Iterator[tuple[int, object]]:
    number = 0
    try:
        with pa.parquet.ParquetFile(os.fsdecode(path)) as file:
            for batch in file.iter_batches(4096):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: value for name, value in row.items() if not isinstance(value, (bytes, dict))}
    except (OSError, ValueError, OverflowError, pa.ArrowException) as e:
        raise Broken(number, f"cannot be read as parquet: {first_line(e)}") from None


READERS = {".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}


def opened(path: bytes):
    try:
        return open(path, "rb")
    except OSError as e:
        raise Broken(0, f"cannot be read: {e.strerror}") from None


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def assign(root: bytes, pictures: pa.ChunkedArray, tables: list[tuple[pa.Table, list[Note]]]
           ) -> tuple[pa.ChunkedArray, list[Note]]:
    """The columns that tables give to each picture, null for none, and what is wrong with them."""
    notes = [note for _, found in tables for note in found]
    rows = pa.concat_tables([ROW.empty_table(), *(table.replace_schema_metadata() for table, _ in tables)]).combine_chunks()
    table_of = np.repeat(np.arange(len(tables)), [len(table) for table, _ in tables])
    shown = [table.schema.metadata[b"shown"].decode() for table, _ in tables]
    at = find(rows["name"], pictures)
    if (at < 0).any():      # another system may have taken names apart into letters and accents
        by_form = {form(name): n for n, name in enumerate(pictures.to_pylist())}
        for n in np.flatnonzero(at < 0).tolist():
            at[n] = by_form.get(form(rows["name"][n].as_py()), -1)
    first = np.full(len(pictures), -1)
    first[at[at >= 0][::-1]] = np.flatnonzero(at >= 0)[::-1]        # of several the first stays
    kept = np.zeros(len(at), bool)
    kept[first[first >= 0]] = True
    for n in np.flatnonzero(~kept).tolist():
        name = rows["name"][n].as_py()
        base = printable(posixpath.basename(name))
        wrong = (f"a second row for {base}" if at[n] >= 0 else
                 f"{base} is none of the pictures here ({', '.join(SUFFIXES)})" if os.path.exists(os.path.join(root, name))
                 else f"there is no {base}")
        notes.append(Note("table", f"{shown[table_of[n]]}:{rows['line'][n].as_py()}", wrong))
    return chosen(rows["columns"], first), notes


def form(name: bytes) -> str:
    return unicodedata.normalize("NFC", os.fsdecode(name))


def read_sidecars(prefix: str, root: bytes, listed: pa.Table, memory: Memory) -> tuple[pa.ChunkedArray, list[Note]]:
    """The columns that each of the sidecars gives, null for none, and what is wrong with them."""
    def read(rows: np.ndarray) -> Iterator[Found]:
        for some in portions(rows, 1000):
            texts, reasons, lasting = [], [], []
            for name in listed["name"].take(some).to_pylist():
                text = reason = None
                lasting.append(True)
                try:
                    text = columns(sidecar(whole(os.path.join(root, name), TEXT_BYTES)))
                except UnicodeDecodeError as e:
                    reason = not_utf8(e)
                except OSError as e:
                    reason, lasting[-1] = f"cannot be read: {e.strerror}", False
                texts.append(text)
                reasons.append(reason)
            yield some, pa.record_batch([texts, reasons], schema=TEXT), lasting

    found = memory.recall("text", key(os.fsdecode(os.path.abspath(root))), listed, TEXT, read)
    wrong = np.flatnonzero(pc.is_valid(found["reason"]))
    return found["columns"], [Note("text", printable(prefix + os.fsdecode(name)), reason) for name, reason in
                              zip(listed["name"].take(wrong).to_pylist(), found["reason"].take(wrong).to_pylist())]


def merged(*layers: pa.ChunkedArray) -> pa.ChunkedArray:
    """The columns of all layers together; of a column that several have, the first layer's."""
    whole = layers[0]
    for lower in layers[1:]:
        both = np.flatnonzero(pc.and_(pc.is_valid(whole), pc.is_valid(lower)))
        upper, whole = whole, pc.coalesce(whole, lower)
        if len(both):
            replaced = whole.to_pylist()
            for n in both.tolist():
                replaced[n] = columns(json.loads(lower[n].as_py()) | json.loads(upper[n].as_py()))
            whole = pa.chunked_array([pa.array(replaced, pa.large_binary())])
    return pc.coalesce(whole, NOTHING)
