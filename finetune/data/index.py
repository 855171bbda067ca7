"""The examples of all sources as one table: what each picture is, what is written beside it, and where its bytes lie.

Every picture is decoded in full once; what was found out is remembered, so that the next start only asks the disk for
sizes and times. All columns are whole arrays: a million examples are no million objects."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from hashlib import sha256
from typing import Literal

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc

from finetune.data.examine import FACTS, examined
from finetune.data.folders import LISTING, Folder, stem
from finetune.data.memory import LISTED, Memory, chosen, find, home, key
from finetune.data.pictures import MEMORY, SUFFIXES, Reading
from finetune.data.sources import locate
from finetune.data.tables import Note, printable, whole
from finetune.errors import FinetuneError, refuse
from finetune.recipe.data import Images

NO_MASK = pa.scalar(bytes(32), pa.binary(32))
PLACED = ("name", "part", "offset", "size")          # what a place wants to know to read
# What the files beside pictures are called, what can be written instead of their folder, and what that does.
PAIRED = {"data.mask.source": ("mask", "alpha", "takes the pictures' own transparency"),
          "data.inpaint.masks": ("mask", "random", "draws them"), "data.condition": ("condition", None, None)}
TABLE = pa.schema([("source", pa.int16()), ("repeats", pa.int32()), *(field for field in LISTING if field.name != "stamp"),
                   *(field for field in FACTS if field.name not in ("suffix", "reason")),
                   *((name + end, kind) for name in ("mask", "shown")       # the path of a file, and what it holds
                     for end, kind in (("", pa.large_binary()), ("_digest", pa.binary(32))))])


class Index:
    """Examples by number."""

    def __init__(self, places: list, table: pa.Table, notes: list[Note]):
        self.places, self.table, self.notes = places, table.combine_chunks(), notes
        for name in ("source", "repeats", "width", "height", "phash"):
            setattr(self, name, self.table[name].to_numpy())
        self.digest, self.mask_digest, self.shown_digest = map(self._digests, ("digest", "mask_digest", "shown_digest"))

    def __len__(self) -> int:
        return len(self.table)

    def name(self, i: int) -> str:
        """For messages: a path, shard.tar/member, or `ID[train][17]`."""
        return printable(self._place(i).prefix + os.fsdecode(self._value("name", i)))

    def columns(self, i: int) -> dict[str, str]:
        """What is written beside the picture; `text` is the caption."""
        return json.loads(self._value("columns", i))

    def read(self, i: int) -> bytes:
        """The picture's bytes. Raises FinetuneError when they cannot be read any more, or are others than at the start: what
        is trained, and kept in the cache, is what the run's identity tells."""
        where = [self._value(column, i) for column in PLACED]
        return _known(self.name(i), lambda: self._place(i).read(*where), self.digest[i])

    def read_beside(self, i: int, kind: Literal["mask", "shown"]) -> bytes | None:
        """The file that counts the picture's pixels, or the one that the network is shown; None where there is none."""
        path = self._value(kind, i)
        digests = {"mask": self.mask_digest, "shown": self.shown_digest}[kind]
        return None if path is None else _known(printable(path), lambda: whole(path, MEMORY), digests[i])

    def take(self, rows: np.ndarray) -> "Index":
        return Index(self.places, self.table.take(rows), self.notes)

    def fingerprint(self) -> str:
        """What the data is, whatever the folders are called: a hash of all contents, columns, repeats and masks."""
        whole = sha256()
        texts = self.table["columns"].combine_chunks()
        ends = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset:texts.offset + len(texts) + 1]
        for part in (self.digest, self.mask_digest, self.repeats, np.diff(ends)):
            whole.update(np.ascontiguousarray(part))
        if len(texts):
            whole.update(memoryview(texts.buffers()[2])[ends[0]:ends[-1]])
        if self.shown_digest.any():
            whole.update(np.ascontiguousarray(self.shown_digest))
        return whole.hexdigest()

    def _value(self, column: str, i: int):
        return self.table[column][int(i)].as_py()

    def _place(self, i: int):
        return self.places[self.source[i]]

    def _digests(self, column: str) -> np.ndarray:
        values = self.table[column].combine_chunks()
        return np.frombuffer(values.buffers()[1] or b"", np.uint8).reshape(-1, 32)[values.offset:values.offset + len(values)]


def concatenated(indexes: list[Index]) -> Index:
    tables, places, notes = [], [], []
    for index in indexes:
        shifted = pa.array(index.source + len(places), pa.int16())
        tables.append(index.table.set_column(0, TABLE.field("source"), shifted))
        places += index.places
        notes += index.notes
    return Index(places, pa.concat_tables(tables), notes)


def build(sources: Sequence[Images], reading: Reading, masks: str | None, say: Callable[[str], None], quiet: bool,
          field: str = "data.images", holes: str | None = None, conditions: str | None = None) -> Index:
    """The index of some sources: in their order, and each in the order of its names' bytes, or of its rows.

    `masks`, and likewise `holes` or `conditions`, is a folder with one for each picture, under the same name beside the
    suffix. What is wrong with single files stands in the notes; raises FinetuneError for a source that is not there or holds
    no pictures."""
    places, problems, tables, notes = [], [], [], []
    where = [field] if len(sources) == 1 else [f"{field}.{number}" for number in range(len(sources))]
    memory = Memory(home() / "index", say)
    for at, source in zip(where, sources):
        try:
            places.append(locate(source))
        except FinetuneError as e:
            problems.append(f"{at}: {e}")
    refuse(problems)
    for number, (at, source, place) in enumerate(zip(where, sources, places)):
        table, found = looked_at(place, reading, memory, quiet)
        notes += found
        if not len(table) and not any(note.fatal for note in found):
            problems += [f"{at}: {source.path} holds no pictures ({', '.join(SUFFIXES)})",
                         *(f"    {note.name}: {note.text}" for note in found[:5])]
        count = len(table)
        whole = {"source": np.full(count, number, np.int16), "repeats": np.full(count, source.repeats, np.int32),
                 **{name: pa.nulls(count, pa.large_binary()) for name in ("mask", "shown")},
                 **{name: pa.repeat(NO_MASK, count) for name in ("mask_digest", "shown_digest")}}
        tables.append(pa.table([whole[name] if name in whole else table[name] for name in TABLE.names], schema=TABLE))
    refuse(problems)
    for column, word, folder in (("mask", "data.mask.source", masks), ("shown", "data.inpaint.masks", holes),
                                 ("shown", "data.condition", conditions)):
        if folder not in (None, PAIRED[word][1]):
            tables, found = paired(column, word, tables, places, os.path.expanduser(folder), reading, memory, quiet)
            notes += found
    return Index(places, pa.concat_tables(tables), notes)


def looked_at(place, reading: Reading, memory: Memory, quiet: bool) -> tuple[pa.Table, list[Note]]:
    """The pictures of a place that can be read, and what is wrong with it."""
    table, notes = place.listing(memory)
    listed = table.select(LISTED.names)
    facts = memory.recall("facts", key(place.identity, astuple(reading), PIL.__version__), listed, FACTS,
                          lambda rows: examined(place, listed, reading, rows, quiet))
    for n, name in enumerate(FACTS.names):
        table = table.append_column(FACTS.field(n), facts[name])
    readable = pc.is_null(table["reason"])
    wrong = table.filter(pc.invert(readable))
    for name, reason in zip(wrong["name"].to_pylist(), wrong["reason"].to_pylist()):
        notes.append(Note("unreadable", printable(place.prefix + os.fsdecode(name)),
                          f"not a readable picture ({reason}); repair or remove it"))
    other = table.filter(pc.is_valid(table["suffix"]))
    for name, suffix in zip(other["name"].to_pylist(), other["suffix"].to_pylist()):
        notes.append(Note("suffix", printable(place.prefix + os.fsdecode(name)), f"is {suffix} by its content", False))
    return table.filter(readable) if len(wrong) else table, notes


def paired(column: str, word: str, tables: list[pa.Table], places: list, folder: str, reading: Reading, memory: Memory,
           quiet: bool) -> tuple[list[pa.Table], list[Note]]:
    """The pictures with the files of their names in that column, and what is wrong with these."""
    noun, other, what = PAIRED[word]
    if not os.path.isdir(folder):
        either = f"`{other}` or " if other else ""
        raise FinetuneError(f"{word}: there is no folder {folder}; it is {either}a folder of {noun}s")
    for place in places:
        if not isinstance(place, Folder):
            raise FinetuneError(f"{word}: {place.prefix} is no folder, and a folder of {noun}s goes with folders of "
                                f"pictures{f'; `{other}` {what}' if other else ''}")
    place = Folder(folder)
    files, found = looked_at(place, reading, memory, quiet)
    notes = [replace(note, kind="mask") for note in found if note.kind == "unreadable"]
    used, done, stems = np.zeros(len(files), bool), [], _stems(files)

    def note(owner: Folder, table: pa.Table, n: int, text: str, fatal: bool = True) -> None:
        notes.append(Note("mask", printable(owner.prefix + os.fsdecode(table["name"][n].as_py())), text, fatal))

    for owner, table in zip(places, tables):
        at = find(_stems(table), stems)
        found = {name: chosen(files[name], at) for name in ("name", "width", "height", "digest")}
        for n in np.flatnonzero(at < 0).tolist():
            note(owner, table, n, f"has no {noun} of its name in {folder}")
        fits = pc.and_(pc.equal(found["width"], table["width"]), pc.equal(found["height"], table["height"]))
        for n in np.flatnonzero(pc.fill_null(pc.invert(fits), False)).tolist():
            size, own = (" × ".join(str(t[side][n]) for side in ("width", "height")) for t in (found, table))
            note(owner, table, n, f"has {own} pixels and its {noun} {size}; make them equal")
        used[at[at >= 0]] = True
        prefix, nothing = (pa.scalar(part, pa.large_binary()) for part in (os.fsencode(place.prefix), b""))
        digests = pc.coalesce(found["digest"], NO_MASK)
        paths = pc.binary_join_element_wise(prefix, found["name"], nothing)
        for name, values in ((column, paths), (f"{column}_digest", digests)):
            table = table.set_column(TABLE.names.index(name), name, values)
        done.append(table)
    for n in np.flatnonzero(~used).tolist():
        note(place, files, n, "there is no picture of this name", False)
    return done, notes


def _known(name: str, read: Callable[[], bytes], digest: np.ndarray) -> bytes:
    try:
        data = read()
    except OSError as e:
        raise FinetuneError(f"{name}: cannot be read any more ({e.strerror or e})") from None
    if sha256(data).digest() != digest.tobytes():
        raise FinetuneError(f"{name}: has changed since it was read at the start; give the same command again")
    return data


def _stems(table: pa.Table) -> pa.ChunkedArray:
    return pa.chunked_array([[stem(name) for name in table["name"].to_pylist()]], pa.large_binary())
