"""Where pictures lie: a folder, tar shards or a table of the `datasets` library, told apart by what the path is.

Each is a place with three calls: `listing` what it holds without opening a picture, `read` the bytes of one of these rows,
and make rows `portable`: something that can be sent to another process, where it is told which rows are read `soon`, and
can `read` them."""

import glob
import os
import re

from finetune.data.folders import Folder
from finetune.data.shards import Shards
from finetune.errors import FinetuneError, nearest
from finetune.recipe.data import Images

COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tar\.\w+)$", re.IGNORECASE)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate(source: Images):
    """The place that a source names: a Folder, Shards or a Saved table. Raises FinetuneError when there is none."""
    path = os.path.expanduser(source.path)
    if COMPRESSED.search(path):
        raise FinetuneError(f"{path} is compressed, so its pictures cannot be read one by one; unpack it to a plain .tar")
    if path.lower().endswith(".tar") and not os.path.isdir(path):
        found = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
        files = sorted(filter(os.path.isfile, found), key=os.fsencode)
        if not files:
            raise FinetuneError(f"no file fits {path}{_near(path)}")
        place = Shards.of(path, files)
    elif any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):     # `save_to_disk`'s
        from finetune.data.tabular import saved
        return saved(path, source)
    elif os.path.isdir(path):
        place = Folder(path)
    elif os.path.exists(path):
        raise FinetuneError(f"{path} is a file; a folder, .tar shards, a saved dataset or a hub id is needed")
    elif HUB_ID.fullmatch(path) and not os.path.isdir(os.path.dirname(path)):
        from finetune.data.tabular import from_hub
        return from_hub(source)
    else:
        raise FinetuneError(f"there is no folder {path}{_near(path)}")
    if odd := source.model_dump(exclude={"path", "repeats"}, exclude_defaults=True):
        raise FinetuneError(f"{', '.join(odd)} goes with a dataset, but {path} is {place.kind}")
    return place


def _near(path: str) -> str:
    folder, name = os.path.split(path.rstrip(os.sep))
    try:
        return nearest(name, (n for n in os.listdir(folder or ".") if not n.startswith(".")))
    except OSError:
        return f"; there is no folder {folder}"
