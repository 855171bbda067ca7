"""Tar shards, the webdataset convention: members whose names agree up to the first dot are one example.

Nothing is unpacked and nothing but text is loaded: a picture is read by its place in the tar."""

import json
import os
import tarfile
from dataclasses import dataclass

import pyarrow as pa

from finetune.data.folders import LISTING, PICTURES, fetch
from finetune.data.memory import Memory, key, stamp
from finetune.data.pictures import MEMORY
from finetune.data.tables import SIDECARS, TEXT_BYTES, Note, columns, first_line, fits, not_utf8, printable, sidecar

MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
WRITTEN = (".json", *reversed(SIDECARS))        # the last word counts


@dataclass(frozen=True)
class Shards:
    """Plain tar files, in the order of their names."""

    pattern: str                    # that all of them fit
    folder: str                     # that all of them lie in
    files: tuple[str, ...]          # paths from there
    kind = "made of tar shards"

    @classmethod
    def of(cls, pattern: str, paths: list[str]) -> "Shards":
        folder = os.path.commonpath([os.path.dirname(path) for path in paths])
        return cls(pattern, folder, tuple(os.path.relpath(path, folder or ".") for path in paths))

    @property
    def prefix(self) -> str:
        return os.path.join(self.folder, "")

    @property
    def identity(self) -> str:
        return os.path.abspath(self.pattern)

    def read(self, name: bytes, part: int, offset: int, size: int) -> bytes:
        fits(size, MEMORY)
        with open(os.path.join(self.folder, self.files[part]), "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise OSError(0, "the tar is cut short")
        return data

    def soon(self, rows: list[tuple]) -> None:
        for _, part, offset, size in rows:
            fetch(os.path.join(self.folder, self.files[part]), offset, size)

    def portable(self, rows: pa.RecordBatch) -> "Shards":
        return self

    def listing(self, memory: Memory) -> tuple[pa.Table, list[Note]]:
        tables, notes = [LISTING.empty_table()], []
        for part, file in enumerate(self.files):
            path = os.path.join(self.folder, file)
            status = os.stat(path)
            stat = repr((part, status.st_size, stamp(status)))
            shard = Shard(path, os.fsencode(file), part, stamp(status))
            known, found = memory.once("tar", key("tar", os.path.abspath(path), path, file), stat, shard.looked_into)
            notes += [Note(**note) for note in found]
            tables.append(known.replace_schema_metadata())
        return pa.concat_tables(tables).combine_chunks(), notes


class Shard:
    """What is in one tar."""

    def __init__(self, path: str, name: bytes, part: int, stamp: int):
        self.path, self.name, self.part, self.stamp = path, name, part, stamp
        self.notes: list[Note] = []
        self.pictures: dict[str, list[tuple[str, int, int]]] = {}       # example -> members
        self.written: dict[str, dict[str, bytes]] = {}                  # example -> suffix -> content

    def looked_into(self) -> tuple[pa.Table, list[dict]]:
        """The examples, and what is wrong with them."""
        self.read()
        return self.table(), [vars(note) for note in self.notes]

    def note(self, kind: str, member: str, text: str, fatal: bool = True) -> None:
        self.notes.append(Note(kind, printable(self.path + ("/" + member if member else "")), text, fatal))

    def read(self) -> None:
        try:
            with open(self.path, "rb") as file:
                start = file.read(8)
                for magic, how in MAGIC.items():
                    if start.startswith(magic):
                        return self.note("member", "", f"is compressed with {how}, so its pictures cannot be read one by "
                                         "one; unpack it to a plain .tar")
                file.seek(0)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    end = -1
                    while (member := tar.next()) is not None:
                        tar.members.clear()         # there may be millions
                        if not end < member.offset_data <= tar.offset:
                            raise tarfile.ReadError("its members overlap")
                        end = member.offset_data
                        self.take(member, tar)
                    file.seek(tar.offset)
                    if any(file.read(tarfile.BLOCKSIZE)):       # tarfile takes a damaged header for the end
                        raise tarfile.ReadError(f"no member begins at byte {tar.offset}")
        except Exception as e:      # a hostile tar may fail in any way; the file is the culprit, and it is named
            self.note("member", "", f"cannot be read to its end ({first_line(e)}); make it again")

    def take(self, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
        folder, slash, base = member.name.rpartition("/")
        example, dot, suffix = base.partition(".")
        if member.isdir() or base.startswith("."):
            return
        if member.name.startswith("/") or ".." in folder.split("/") or not member.isreg() or member.sparse is not None:
            return self.note("member", member.name, "is no plain file inside the tar; make the tar without it")
        example, suffix = folder + slash + example, dot + suffix.lower()
        if suffix[suffix.rfind("."):].encode() in PICTURES:
            self.pictures.setdefault(example, []).append((member.name, member.offset_data, member.size))
        elif suffix in WRITTEN and member.size > TEXT_BYTES:
            self.note("text", member.name, f"has more than {TEXT_BYTES:,} bytes; is it a caption?")
        elif suffix in WRITTEN:
            self.written.setdefault(example, {})[suffix] = tar.extractfile(member).read()

    def table(self) -> pa.Table:
        """The examples in the order of their pictures' names."""
        rows = []
        for example, members in self.pictures.items():
            if len(members) > 1:        # `a.seg.png` is something that belongs to `a.png`
                plain = [m for m in members if m[0].rpartition("/")[2].count(".") == 1]
                members = plain or members
            for name, *_ in members[1:]:
                self.note("member", name, f"a second picture of the example {printable(example)}, as its name is the same "
                          "up to the first dot; rename one")
            name, offset, size = members[0]
            rows.append((self.name + b"/" + os.fsencode(name), self.part, offset, size, self.stamp,
                         columns(self.row(example))))
        for example in self.written.keys() - self.pictures.keys():
            self.note("sidecar", example, "there is no picture of this name beside it", False)
        return pa.table([list(column) for column in zip(*sorted(rows))] or [[]] * len(LISTING), schema=LISTING)

    def row(self, example: str) -> dict:
        row, written = {}, self.written.get(example, {})
        for suffix in WRITTEN:
            if suffix in written:
                try:
                    text = written[suffix]
                    found = sidecar(text) if suffix in SIDECARS else json.loads(text.decode("utf-8-sig"))
                    columns(found)
                    row |= {name: value for name, value in found.items() if value != ""}
                except UnicodeDecodeError as e:
                    self.note("text", example + suffix, not_utf8(e))
                except (ValueError, AttributeError, RecursionError):
                    self.note("table", example + suffix, "no JSON object")
        return row
