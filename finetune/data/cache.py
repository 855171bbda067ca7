"""What the frozen encoders gave, on disk, found by what it was made from. The why: docs/decisions/0006-cache.md.

A shard is a pair of files that one process appends to and nobody changes: `KIND-TIME-RANDOM.data` holds entries end to
end, each a small safetensors file, and `.index` one row for each. A row is believed only if its checksum fits its key
and its bytes; so whatever a kill, a full disk or a flipped bit leaves behind is not there, and is made anew."""

import errno
import json
import secrets
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import numpy as np
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from finetune.data import memory
from finetune.errors import FinetuneError

FORMAT = 1                      # of the entries; another one is never read
SHARD_BYTES = 2**30
RESERVE_BYTES = 2**30           # disk space that is left to the run itself
ROW = np.dtype([("key", "S32"), ("offset", "<u8"), ("bytes", "<u4"), ("check", "<u4")])
PLACE = np.dtype([("shard", "<i4"), *ROW.descr[1:]])        # `bytes` is 0 where there is nothing

Entry = dict[str, Tensor]


def home() -> Path:
    return memory.home() / "encoded"


def key(*decisive) -> str:
    """32 hex digits for plain values that together decide an entry."""
    return blake2b(json.dumps([FORMAT, *decisive], sort_keys=True).encode(), digest_size=16).hexdigest()


def checksum(key: bytes, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(key))


class Cache:
    """The shards of a folder, shared with any number of other processes, and this one's own new shards.

    What the disk refuses is kept in memory, which is said once; `strict` makes it a FinetuneError. Without a folder
    everything is kept in memory."""

    def __init__(self, folder: Path | None = None, say: Callable[[str], None] = print, strict: bool = False):
        self.folder, self.say, self.strict = folder, say, strict
        self.writable = folder is not None
        self.memory: dict[bytes, Entry] = {}
        self.shards: list[Path] = []            # what the shard number of a place means
        self.own: dict[str, int] = {}           # kind -> the shard that this process appends to
        self.damaged = 0

    def find(self, kind: str, keys: np.ndarray) -> np.ndarray:
        """The places of keys, which are sorted and different. What is found counts as used."""
        places = np.zeros(len(keys), PLACE)
        # By name, so by age: of two entries with one key the newer one wins, for the older one may be damaged.
        for index in sorted(self.folder.glob(f"{kind}-*.index")) if self.folder and len(keys) else ():
            rows, shard = read_index(index), index.with_suffix(".data")
            at = np.searchsorted(keys, rows["key"]).clip(max=len(keys) - 1)
            known = keys[at] == rows["key"]
            if known.any():
                at, rows = at[known], rows[known]
                for name in ROW.names[1:]:
                    places[name][at] = rows[name]
                places["shard"][at] = len(self.shards)
                self.shards.append(shard)
                memory.used(index)
                memory.used(shard)
        return places

    def read(self, key: bytes, place: np.void) -> Entry | None:
        """The entry, or None when its bytes cannot be read or are not those that were written."""
        with suppress(OSError):
            with open(self.shards[place["shard"]], "rb", buffering=0) as file:
                file.seek(int(place["offset"]))
                data = file.read(int(place["bytes"]))
            if checksum(key, data) == place["check"]:
                return load(data)
        self.damaged += 1
        if self.damaged == 1:
            self.say(f"cache     {self.folder} has damaged entries; they are made anew")
        return None

    def put(self, kind: str, key: bytes, entry: Entry) -> tuple[int, ...]:
        """Keep an entry; returns its place."""
        if self.writable:
            try:
                return self._append(kind, key, save(entry))
            except OSError as e:
                refusal = f"{self.folder} cannot be written: {e.strerror or e}"
                if self.strict:
                    raise FinetuneError(f"the cache {refusal}\n    FINETUNE_CACHE=DIR puts it elsewhere") from None
                self.say(f"cache     {refusal}; what is encoded from now on is kept in memory")
                self.writable = False
        self.memory[key] = entry
        return (0,) * len(PLACE)

    def _append(self, kind: str, key: bytes, data: bytes) -> tuple[int, ...]:
        number = self._shard(kind)
        shard = self.shards[number]
        if shutil.disk_usage(self.folder).free < RESERVE_BYTES + len(data):
            raise OSError(errno.ENOSPC, f"less than {RESERVE_BYTES / 1e9:.1f} GB are free on its disk")
        # No fsync: what a power cut takes is found by its checksum. The data first: a row without it is damage.
        with open(shard, "ab") as file:
            place = file.tell(), len(data), checksum(key, data)
            file.write(data)
        with open(shard.with_suffix(".index"), "ab") as file:
            file.write(np.array([(key, *place)], ROW).tobytes())
        return number, *place

    def _shard(self, kind: str) -> int:
        """The number of a shard of this process that has room."""
        with suppress(OSError, KeyError):       # removed, or none yet
            if self.shards[self.own[kind]].stat().st_size < SHARD_BYTES:
                return self.own[kind]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shards.append(self.folder / f"{kind}-{time.time_ns():020d}-{secrets.token_hex(4)}.data")
        self.own[kind] = len(self.shards) - 1
        return self.own[kind]


class Rows:
    """Entries by number: read from the cache, or made when they are not there or not sound. Equal keys share one."""

    def __init__(self, cache: Cache, kind: str, keys: Iterable[str], make: Callable[[int], Entry]):
        self.cache, self.kind, self.make, self.lock = cache, kind, make, threading.Lock()
        self.keys, self.first, self.which = np.unique(
            np.fromiter(keys, ROW["key"]), return_index=True, return_inverse=True)
        self.places = cache.find(kind, self.keys)

    def missing(self) -> list[int]:
        """The entries that are not in the cache, one number of each."""
        absent = self.places["bytes"] == 0
        if self.cache.memory:
            absent &= [bytes(key) not in self.cache.memory for key in self.keys]
        return np.sort(self.first[absent]).tolist()

    def fill(self, quiet: bool, unit: str, prepare: Callable[[list[int]], Iterable] | None = None) -> "Rows":
        """Make all that is missing. `prepare` gives, for each number in turn, what `make` takes beside the number."""
        missing = self.missing()
        prepared = iter(prepare(missing)) if prepare else None
        for number in tqdm(missing, desc=f"encode {self.kind}", unit=unit, disable=quiet or not missing, leave=False):
            self._keep(number, self.make(number, *([next(prepared)] if prepared else [])))
        return self

    def __getitem__(self, number: int) -> Entry:
        which = self.which[number]
        key, place = bytes(self.keys[which]), self.places[which]
        entry = self.cache.read(key, place) if place["bytes"] else self.cache.memory.get(key)
        if entry is None:
            with self.lock:     # several threads read
                entry = self._keep(number, self.make(number))
        return entry

    def _keep(self, number: int, entry: Entry) -> Entry:
        which = self.which[number]
        self.places[which] = self.cache.put(self.kind, bytes(self.keys[which]), entry)
        return entry


def read_index(index: Path) -> np.ndarray:
    """The rows of an index whose bytes lie inside of its shard; none when one of the two cannot be read."""
    try:
        text, size = index.read_bytes(), index.with_suffix(".data").stat().st_size
    except OSError:
        return np.zeros(0, ROW)
    rows = np.frombuffer(text, ROW, len(text) // ROW.itemsize)
    return rows[(rows["bytes"] > 0) & (rows["offset"].astype(float) + rows["bytes"] <= size)]


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Entries and bytes on disk of each kind."""
    found: dict[str, tuple[int, int]] = {}
    for file in folder.glob("*-*"):
        with suppress(FileNotFoundError):       # another process collects
            entries, size = found.get(kind := file.name.partition("-")[0], (0, 0))
            own = len(read_index(file)) if file.suffix == ".index" else 0
            found[kind] = entries + own, size + file.stat().st_size
    return found
