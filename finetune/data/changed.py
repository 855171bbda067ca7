"""What a run was begun with, picture by picture, so that a start which cannot continue it can say what to put back."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from finetune.data.index import Index, concatenated
from finetune.data.tables import printable
from finetune.disk import replacing, writing

# The columns that the index's fingerprint is made of, and what they are of a picture.
DECISIVE = {"digest": "its content", "columns": "what is written beside it", "repeats": "its repeats",
            "mask_digest": "its mask", "shown_digest": "what is shown with it"}
SHOWN = 3       # names of each kind


def keep(path: Path, indexes: list[Index]) -> None:
    """Write down what is there. Raises FinetuneError when the disk refuses."""
    with writing(str(path)), replacing(path) as staged, open(staged, "wb") as file:     # buffered: arrow writes in crumbs
        pa.parquet.write_table(rows(concatenated(indexes)), file, compression="zstd")


def changes(path: Path, indexes: list[Index]) -> list[str]:
    """What of the data is another since `keep`: so many pictures, and the names of the first."""
    index = concatenated(indexes)
    try:
        kept = pa.parquet.ParquetFile(path).read().cast(rows(index).schema)
    except (OSError, ValueError, pa.ArrowException) as e:
        return [f"data: what was learned from is another; which pictures cannot be told, since {path} cannot be read: {e}"]
    then, now = ({(row.pop("source"), row.pop("name")): row for row in table.to_pylist()} for table in (kept, rows(index)))
    other = {key: [what for column, what in DECISIVE.items() if then[key][column] != now[key][column]]
             for key in then.keys() & now.keys()}
    kinds = {"changed": {key: f" ({', '.join(what)})" for key, what in other.items() if what},
             "missing now": dict.fromkeys(then.keys() - now.keys(), ""), "new": dict.fromkeys(now.keys() - then.keys(), "")}

    def named(found: dict) -> str:
        first = [printable((index.places[source].prefix if source < len(index.places) else "") + os.fsdecode(name)) + what
                 for (source, name), what in sorted(found.items())[:SHOWN]]
        return ", ".join(first) + (" …" if len(found) > SHOWN else "")

    return [f"data: of what is learned, {len(found)} {kind}: {named(found)}" for kind, found in kinds.items() if found] \
        or ["data: its order is another"]


def rows(index: Index) -> pa.Table:
    return index.table.select(["source", "name", *DECISIVE])
