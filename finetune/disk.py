"""Files that are there as a whole or not at all, wherever a kill or a full disk falls."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from finetune.errors import FinetuneError


@contextmanager
def writing(what: str, advice: str = "") -> Iterator[None]:
    """Inside, what the disk refuses is a FinetuneError: that this cannot be written, why, and what to do."""
    try:
        yield
    except OSError as e:
        raise FinetuneError(f"{what} cannot be written: {e.strerror or e}{advice}") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden name beside the path, which gets the path's own name at the end of the block, and after an error is gone."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield staged
        os.replace(staged, path)
    except BaseException:
        with suppress(OSError):
            staged.unlink()
        raise


def alive(pid: int) -> bool:
    """Whether this machine has such a process. The number may come from anywhere."""
    return pid < 2**31 and psutil.pid_exists(pid)


def forsaken(staged: Path) -> bool:
    """Whether nobody will finish what has this hidden name: another process, such as a preview, may be about to."""
    pid = staged.name.split(".")[-2]        # of `replacing`; what else is staged names none
    return not pid.isdecimal() or int(pid) == os.getpid() or not alive(int(pid))


def read_json(path: Path, kind: object) -> object:
    """What a file holds, checked to its last field against a type, as pydantic does. Raises FinetuneError for another."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(path.read_bytes(), strict=True)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise FinetuneError(f"{path} is damaged{f' at {place}' if place else ''}: {first['msg']}") from None


def sync(path: Path) -> None:
    """Have the disk keep a file, or the names in a folder."""
    if os.name == "nt":     # Windows cannot open a folder, and journals the rename by itself
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as staged, open(staged, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    sync(path.parent)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
