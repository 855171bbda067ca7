"""A folder of pictures: the imagefolder convention, at any depth."""

import os
import stat
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from finetune.data.memory import LISTED, Memory, chosen, stamp
from finetune.data.pictures import MEMORY, SUFFIXES
from finetune.data.tables import READERS, SIDECARS, Note, assign, merged, printable, read_sidecars, read_table, whole

LISTING = pa.schema([*LISTED, ("columns", pa.large_binary())])
PICTURES = {suffix.encode() for suffix in SUFFIXES}
NOT_READ = {b".gif", b".heic", b".heif", b".jxl", b".jp2", b".svg", b".psd", b".tga", b".ico", b".jfif", b".dng", b".cr2",
            b".nef", b".arw"}       # pictures too
BESIDE = [suffix.encode() for suffix in SIDECARS]
SYNTHETIC = b"synthetic.jsonl"          # a table that models write (commands/caption.py)
TABLES = {SYNTHETIC, *(b"metadata" + suffix.encode() for suffix in READERS)}


@dataclass(frozen=True)
class Folder:
    """Pictures with a row in a metadata table of any folder, or with a sidecar."""

    path: str
    kind = "a folder of pictures"

    @property
    def prefix(self) -> str:
        return os.path.join(self.path, "")

    @property
    def identity(self) -> str:
        return os.path.abspath(self.path)

    def read(self, name: bytes, part: int, offset: int, size: int) -> bytes:
        return whole(os.path.join(os.fsencode(self.path), name), MEMORY)

    def soon(self, rows: list[tuple]) -> None:
        for name, *_ in rows:
            fetch(os.path.join(os.fsencode(self.path), name))

    def portable(self, rows: pa.RecordBatch) -> "Folder":
        return self

    def listing(self, memory: Memory) -> tuple[pa.Table, list[Note]]:
        """The pictures in the order of their names."""
        root = os.fsencode(self.path)
        found = walk(root, self.prefix)
        tables = {name: read_table(self.prefix, root, name, stat, memory) for name, *stat in sorted(found.tables)}
        beside, notes = read_sidecars(self.prefix, root, found.texts.listed(), memory)
        pictures, order = found.pictures.listed(), np.array(found.beside, np.int64)
        by_name = pc.sort_indices(pictures["name"])
        pictures, order = pictures.take(by_name), order[by_name]
        made = {name: table for name, table in tables.items() if os.path.basename(name) == SYNTHETIC}
        layers = [chosen(beside, order)]
        for some in filter(None, (made, {name: table for name, table in tables.items() if name not in made})):
            rows, wrong = assign(root, pictures["name"], list(some.values()))
            layers, notes = [rows, *layers], notes + wrong
        return pictures.append_column(LISTING.field("columns"), merged(*layers)), found.notes + notes


def fetch(path: str | bytes, offset: int = 0, size: int = 0) -> None:
    """Ask the disk for a piece of a file, or for all of it, and do not wait: it fetches many in the time of a few."""
    with suppress(OSError, AttributeError):     # whoever reads it will say so; some systems cannot be asked
        file = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, offset, size, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)


@dataclass
class Files:
    """Names, sizes and times of files; three lists, because there may be a million."""

    names: list[bytes] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    stamps: list[int] = field(default_factory=list)

    def add(self, entries: list[os.DirEntry]) -> None:
        """Many at once: a million calls would take a second."""
        for entry in entries:
            try:
                status = entry.stat()
            except FileNotFoundError:       # removed in this very moment
                continue
            self.names.append(entry.name)
            self.sizes.append(status.st_size)
            self.stamps.append(stamp(status))

    def listed(self) -> pa.Table:
        zeros = np.zeros(len(self.names), np.int64)
        return pa.table([self.names, zeros.astype(np.int32), zeros, self.sizes, self.stamps], schema=LISTED)


@dataclass
class Found:
    """What lies in a folder."""

    pictures: Files = field(default_factory=Files)
    beside: list[int] = field(default_factory=list)         # of each picture its sidecar, or -1
    texts: Files = field(default_factory=Files)
    tables: list[tuple[bytes, int, int]] = field(default_factory=list)
    folders: list[bytes] = field(default_factory=list)
    links: list[bytes] = field(default_factory=list)        # to folders
    notes: list[Note] = field(default_factory=list)

    def add(self, folder: bytes, other: "Found") -> None:
        """What lies in a folder further down."""
        start = len(self.texts.names)
        self.beside += [n if n < 0 else n + start for n in other.beside]
        for mine, others in ((self.pictures, other.pictures), (self.texts, other.texts)):
            mine.names += [folder + name for name in others.names] if folder else others.names
            mine.sizes += others.sizes
            mine.stamps += others.stamps
        self.tables += [(folder + name, *stat) for name, *stat in other.tables]
        self.folders += [folder + name + b"/" for name in other.folders]
        self.links += [folder + name + b"/" for name in other.links]
        self.notes += other.notes


def walk(root: bytes, prefix: str) -> Found:
    """Everything below a folder that is not hidden. A folder that can be reached in several ways, or contains itself by
    a link, is walked once, by its own name rather than by a link."""
    found, seen = Found(folders=[b""]), set()
    while found.folders or found.links:
        if not found.folders:
            found.folders, found.links = sorted(found.links)[:1], sorted(found.links)[1:]
        fresh = []
        for folder in sorted(found.folders):
            try:
                status = os.stat(os.path.join(root, folder))
            except FileNotFoundError:       # removed in this very moment
                continue
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                fresh.append(folder)
        found.folders = []
        for folder in fresh:        # threads are slower: most of it is Python, and they wait for each other
            found.add(folder, look_into(root, folder, prefix))
    return found


def look_into(root: bytes, folder: bytes, prefix: str) -> Found:
    found = Found()

    def note(kind: str, name: bytes, text: str, fatal: bool = True) -> None:
        found.notes.append(Note(kind, printable(prefix + os.fsdecode(folder + name)), text, fatal))

    try:
        plain, other = [], []
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                name = entry.name
                suffix = name[name.rfind(b"."):].lower()
                if name.startswith(b"."):
                    continue
                if suffix in PICTURES and entry.is_file(follow_symlinks=False):
                    plain.append(entry)
                else:
                    other.append((entry, name, suffix))
        found.pictures.add(plain)
        for entry, name, suffix in other:
            if suffix in PICTURES or suffix in BESIDE or name in TABLES:
                try:
                    status = entry.stat()
                except OSError as e:
                    if suffix in PICTURES:
                        note("unreadable", name, f"not a readable picture ({e.strerror}); repair or remove it")
                    continue
                if stat.S_ISREG(status.st_mode):
                    if suffix in PICTURES:
                        found.pictures.add([entry])
                    elif suffix in BESIDE:
                        found.texts.add([entry])
                    else:
                        found.tables.append((name, status.st_size, stamp(status)))
                    continue
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                (found.links if entry.is_symlink() else found.folders).append(name)
            elif suffix in NOT_READ:
                note("suffix", name, f"is not used: {suffix[1:].decode()} is not read; save it as PNG", False)
    except OSError as e:
        note("folder", b"", f"cannot be listed: {e.strerror}")
    pair(found, note)
    return found


def pair(found: Found, note: Callable) -> None:
    """Give each picture the sidecar of its name."""
    texts = found.texts.names
    if not texts:
        found.beside = [-1] * len(found.pictures.names)
        return
    first: dict[bytes, int] = {}
    for suffix in BESIDE:
        for n, name in enumerate(texts):
            if name.lower().endswith(suffix):
                first.setdefault(stem(name), n)
    found.beside = [first.get(stem(name), -1) for name in found.pictures.names]
    used = set(found.beside)
    for n, name in enumerate(texts):
        if n not in used:
            other = first[stem(name)]
            note("sidecar", name, f"is not used: {printable(texts[other])} is" if other != n else
                 "there is no picture of this name beside it", False)


def stem(name: bytes) -> bytes:
    """The name without its suffix, whatever form its letters are in."""
    name = name[:name.rfind(b".")]
    return name if name.isascii() else os.fsencode(unicodedata.normalize("NFC", os.fsdecode(name)))
