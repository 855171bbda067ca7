"""Tables of the `datasets` library: saved ones, and those of the hub."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub.constants import HF_HUB_CACHE

from finetune.data.folders import LISTING
from finetune.data.memory import Memory, home, key, used
from finetune.data.pictures import MEMORY
from finetune.data.tables import Note, columns, first_line, whole
from finetune.disk import replacing
from finetune.errors import FinetuneError, nearest

SEVERAL = 256       # rows at once


@dataclass(frozen=True)
class Carried:
    """Pictures on their way to another process."""

    pictures: dict[int, bytes | str]        # row -> picture, or why there is none

    def read(self, name: bytes, part: int, offset: int, size: int) -> bytes:
        if isinstance(found := self.pictures[offset], str):
            raise OSError(0, found)
        return found

    def soon(self, rows: list[tuple]) -> None:
        """They are here."""


class Saved:
    """A table with a column of pictures. A row may name a file in one of the dataset's own `folders`, and no other: who made
    the dataset is not to choose what is read of this machine."""

    def __init__(self, table: datasets.Dataset, title: str, image: str, limit: int | None, folders: tuple[str, ...] = ()):
        if image not in table.column_names:
            raise FinetuneError(f"{title} has no column {image}{nearest(image, table.column_names)}\n"
                                f"    there are: {', '.join(table.column_names)}; `image` names the one with the pictures")
        table = table.with_format(None).select(range(min(limit or len(table), len(table))))
        try:
            self.pictures = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        except (TypeError, ValueError, pa.ArrowException) as e:
            raise FinetuneError(f"{title}: its column {image} holds no pictures ({first_line(e)})") from None
        words = {name: feature for name, feature in table.features.items() if name != image
                 and (isinstance(feature, datasets.ClassLabel) or isinstance(feature, datasets.Value)
                      and not feature.dtype.endswith("binary"))}
        self.words, self.image, self.prefix = table.select_columns(list(words)).with_format("arrow"), image, title
        self.classes = {name: feature for name, feature in words.items() if isinstance(feature, datasets.ClassLabel)}
        self.identity, self.folders = f"{os.path.abspath(title)} {image}", [os.path.realpath(folder) for folder in folders]

    def read(self, name: bytes, part: int, offset: int, size: int) -> bytes:
        picture = self.pictures[offset][self.image]
        if picture and picture["bytes"] is not None:
            return picture["bytes"]
        if not picture or not picture["path"]:
            raise OSError(0, "there is no picture in this row")
        path = Path(os.path.realpath(picture["path"]))
        if not path.is_file() or not any(path.is_relative_to(folder) for folder in self.folders):
            raise OSError(0, f"the row holds no picture but the name {picture['path']!r}, which is no file of the dataset")
        return whole(path, MEMORY)

    def portable(self, rows: pa.RecordBatch) -> Carried:
        carried = {}
        for number in rows["offset"].to_pylist():
            try:
                carried[number] = self.read(b"", 0, number, 0)
            except OSError as e:
                carried[number] = e.strerror or str(e)
        return Carried(carried)

    def listing(self, memory: Memory) -> tuple[pa.Table, list[Note]]:
        """The rows as they come."""
        count = len(self.pictures)
        stats = [(file["filename"], os.stat(file["filename"])) for file in self.pictures.cache_files]
        stamp = key(self.prefix, [(name, status.st_size, status.st_mtime_ns) for name, status in stats])
        stat, place = f"{count} {stamp}", key("words", self.identity)

        def read() -> tuple[pa.Table, list]:
            texts, numbers = [text for batch in self._words() for text in batch], np.arange(count)
            return pa.table([[b"[%d]" % n for n in numbers.tolist()], np.zeros(count, np.int32), numbers,
                             np.zeros(count, np.int64), np.full(count, int(stamp[:15], 16)), texts], schema=LISTING), []

        return memory.once("words", place, stat, read)[0].replace_schema_metadata(), []

    def _words(self) -> Iterator[list[bytes]]:
        if not self.words.column_names:
            yield [columns({})] * len(self.pictures)
            return
        for batch in self.words.iter(SEVERAL):
            rows = batch.to_pylist()
            for row in rows:
                for name, kinds in self.classes.items():
                    row[name] = None if row[name] in (None, -1) else kinds.int2str(row[name])
            yield [columns(row) for row in rows]


def saved(path: str, source) -> Saved:
    if source.streaming:
        raise FinetuneError(f"streaming goes with a hub id, but {path} is a saved dataset")
    try:
        table = datasets.load_from_disk(path)
    except Exception as e:      # whatever the library stumbles over, the folder is the culprit, and it is named
        raise FinetuneError(f"{path}: this saved dataset cannot be loaded ({first_line(e)})") from None
    title = path
    if isinstance(table, datasets.DatasetDict):
        if source.split not in table:
            raise FinetuneError(f"{path} has no split {source.split}{nearest(source.split, table)}; "
                                f"there are: {', '.join(table)}")
        table, title = table[source.split], f"{path}[{source.split}]"
    elif source.split not in ("train", str(table.split)):
        raise FinetuneError(f"{path} has no split {source.split}; it is one table")
    return Saved(table, title, source.image, source.limit, (path,))


def from_hub(source) -> Saved:
    """A dataset of the hub: downloaded, or the first rows of it, read once and kept."""
    title = f"{source.path}[{source.split}]"
    if not source.streaming:
        return Saved(_load(source), title, source.image, source.limit, (HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE))
    if not source.limit:
        raise FinetuneError("streaming needs a limit: how many examples to read")
    kept = home() / "streams" / f"{key(source.path, source.split, source.limit)}.arrow"
    if not kept.is_file():
        stream = _load(source)
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept) as staged:
                _keep(stream, source.limit, staged)
        except Exception as e:
            raise FinetuneError(f"{source.path}: reading it was cut off ({first_line(e)}); "
                                "give the same command again") from None
    used(kept)
    return Saved(datasets.Dataset.from_file(str(kept)), title, source.image, source.limit)


def _load(source):
    try:
        return datasets.load_dataset(source.path, split=source.split, streaming=source.streaming)
    except Exception as e:      # offline, absent, gated, no such split, a broken file: the library says which
        raise FinetuneError(f"there is no folder {source.path}, and as a dataset of the hub it cannot be loaded: "
                            f"{first_line(e)}") from None


def _keep(stream, limit: int, file: Path) -> None:
    """Write the first rows with the pictures' bytes in them."""
    stream = stream.take(limit)
    for name, feature in (stream.features or {}).items():
        if isinstance(feature, datasets.Image):
            stream = stream.cast_column(name, datasets.Image(decode=False))
    with ExitStack() as opened:
        writer = schema = None
        for batch in stream.with_format("arrow").iter(SEVERAL):
            batch = datasets.table.embed_table_storage(_of_the_hub(batch))
            if not writer:
                schema, sink = batch.schema, opened.enter_context(pa.OSFile(str(file), "wb"))
                writer = opened.enter_context(pa.ipc.new_stream(sink, schema))
            writer.write_table(batch.cast(schema))
        if not writer:
            raise ValueError("it has no rows")


def _of_the_hub(batch: pa.Table) -> pa.Table:
    """The columns that are used. Raises ValueError for a picture that is neither in its row nor a file of the hub."""
    pictures = [name for name in batch.column_names if {"bytes", "path"} <= {field.name for field in _inner(batch[name].type)}]
    for name in pictures:
        named = batch[name].filter(pc.is_null(pc.struct_field(batch[name], "bytes")))
        for path in filter(None, pc.struct_field(named, "path").to_pylist()):
            if not path.rpartition("::")[2].startswith("hf://"):
                raise ValueError(f"a row holds no picture but the name {path!r}, which is no file of the hub")
    return batch.select([name for name in batch.column_names if name in pictures or not pa.types.is_nested(batch[name].type)])


def _inner(kind: pa.DataType) -> list[pa.Field]:
    return [kind.field(n) for n in range(kind.num_fields)] if pa.types.is_struct(kind) else []
