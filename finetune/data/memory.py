"""What was found out about files, kept on disk so that the next start need not read them again.

Arrow tables, each in a file that is replaced as a whole and ends with its checksum: what a kill or a flipped bit leaves
behind is not there, and is found out anew."""

import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from finetune.disk import replacing
from finetune.errors import FinetuneError

FORMAT = 2          # of the tables and of what is found out; another one is never read
CHECK_BYTES = 4

# Files, or pieces of files: `stamp` is whatever changes with the content, beside the size.
LISTED = pa.schema([("name", pa.large_binary()), ("part", pa.int32()), ("offset", pa.int64()), ("size", pa.int64()),
                    ("stamp", pa.int64())])
Found = tuple[np.ndarray, pa.RecordBatch, list[bool]]       # of some rows: what was found out, and whether it will stay so


# What is kept beside the cache of the encoders (cache.py): class pictures, facts about files, streams that were read.
BESIDE = {"class": "folders", "index": "files", "streams": "files"}


def home() -> Path:
    """The toolkit's folder of what can be made anew: $FINETUNE_CACHE or ~/.cache/finetune. FinetuneError for neither."""
    try:
        return Path(os.environ.get("FINETUNE_CACHE") or "~/.cache/finetune").expanduser()
    except RuntimeError:
        raise FinetuneError("this user has no home folder, where the cache would be; set FINETUNE_CACHE=DIR") from None


def key(*decisive) -> str:
    """32 hex digits for plain values that together decide something."""
    return blake2b(json.dumps([FORMAT, *decisive]).encode(), digest_size=16).hexdigest()


def used(path: Path) -> None:
    """Note that something below `home` is still used."""
    with suppress(OSError):     # somebody else's may be read too
        os.utime(path)


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size


def collect(folder: Path, days: float) -> int:
    """Remove what nobody has used for that long of a folder below `home`; returns the bytes freed."""
    freed = 0
    for path in sorted(folder.glob("*"), reverse=True):     # of a shard its index first: data without a row is nothing
        with suppress(FileNotFoundError):                   # another process collects too
            if path.stat().st_mtime <= time.time() - days * 86400:
                freed += size(path)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return freed


def stamp(status: os.stat_result) -> int:
    """Another number when a file was edited, even if its time was put back: then its inode tells."""
    return (3 * status.st_mtime_ns + status.st_ctime_ns) % 2**63


class Memory:
    """Tables by name in a folder that any number of processes share. Where it cannot be written nothing is kept."""

    def __init__(self, folder: Path, say: Callable[[str], None] = print):
        self.folder, self.say, self.writable = folder, say, True

    def load(self, kind: str, name: str) -> pa.Table | None:
        """The table that was saved last, mapped from the disk."""
        with suppress(OSError, pa.ArrowInvalid):
            whole = pa.memory_map(str(self._file(kind, name))).read_buffer()
            used(self._file(kind, name))
            body = whole.slice(0, max(0, whole.size - CHECK_BYTES))
            if zlib.crc32(body).to_bytes(CHECK_BYTES, "little") == bytes(whole[body.size:]):
                return pa.ipc.open_file(pa.BufferReader(body)).read_all().combine_chunks()
        return None

    def save(self, kind: str, name: str, table: pa.Table) -> None:
        if not self.writable:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._file(kind, name)) as staged, open(staged, "w+b") as file:
                with pa.ipc.new_file(file, table.schema) as writer:
                    writer.write_table(table)
                file.seek(0)
                check = 0
                while block := file.read(2**20):
                    check = zlib.crc32(block, check)
                file.write(check.to_bytes(CHECK_BYTES, "little"))
        except OSError as e:
            self.writable = False
            self.say(f"index     {self.folder} cannot be written: {e.strerror or e}; the next start reads all again")

    def once(self, kind: str, name: str, stat: str, read: Callable[[], tuple[pa.Table, list]]) -> tuple[pa.Table, list]:
        """What `read` gives, a table and plain values, or what it gave when `stat` was the same."""
        known = self.load(kind, name)
        if known is None or known.schema.metadata[b"stat"].decode() != stat:
            table, notes = read()
            said = {**(table.schema.metadata or {}), b"stat": stat, b"notes": json.dumps(notes)}
            known = table.replace_schema_metadata(said)
            self.save(kind, name, known)
        return known, json.loads(known.schema.metadata.get(b"notes", "[]"))

    def recall(self, kind: str, name: str, listed: pa.Table, schema: pa.Schema,
               read: Callable[[np.ndarray], Iterable[Found]]) -> pa.Table:
        """What is known about each of the listed files; only those that are new or edited are read.

        What was found out before an interruption is kept."""
        known = self.load(kind, name)
        if known is None:
            known = pa.schema([*LISTED, *schema]).empty_table()
        at = find(listed["name"], known["name"])        # what is known of each as it is now, or -1
        for column in ("offset", "size", "stamp") if len(known) else ():
            at = np.where(known[column].to_numpy()[at] == listed[column].to_numpy(), at, -1)
        portions, forget = [known.select(schema.names)], []
        missing, count = np.flatnonzero(at < 0), len(known)
        try:
            for rows, batch, lasting in read(missing):
                at[rows] = count + np.arange(len(rows))
                count += len(rows)
                portions.append(pa.Table.from_batches([batch]))
                forget.append(rows[~np.array(lasting, bool)])
        finally:
            whole = pa.concat_tables(portions).combine_chunks()
            if len(missing) or len(known) != len(listed):
                keep = at >= 0
                keep[np.concatenate([missing[:0], *forget])] = False
                kept = listed.filter(keep)
                for field, values in zip(schema, whole.take(at[keep]).columns):
                    kept = kept.append_column(field, values)
                self.save(kind, name, kept)
        return whole.take(at)

    def _file(self, kind: str, name: str) -> Path:
        return self.folder / f"{kind}-{name}.arrow"


def portions(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start:start + size] for start in range(0, len(rows), size)]


def find(asked: pa.ChunkedArray, known: pa.ChunkedArray) -> np.ndarray:
    """The place in `known` of each value, or -1."""
    return pc.fill_null(pc.index_in(asked, value_set=known), -1).to_numpy().astype(np.int64)


def chosen(values: pa.ChunkedArray, at: np.ndarray) -> pa.ChunkedArray:
    """The values at these places; null for -1."""
    return values.take(pa.array(at, mask=at < 0))
