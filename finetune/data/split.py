"""Which pictures are held out. Copies of one picture stay on one side, or the validation loss would measure memory.

Who is held out follows from the seed and a picture's own content: more pictures leave the earlier ones where they are, but
for the few that keep the share right."""

import os
from hashlib import blake2b
from pathlib import Path
from posixpath import basename, normpath

import numpy as np

from finetune.data.duplicates import originals
from finetune.data.index import Index
from finetune.data.pictures import Reading
from finetune.errors import FinetuneError, nearest, refuse

MANY = 10_000       # names: more take too long to look for a similar one


def split(index: Index, fraction: float | None, files: str | None, seed: int, reading: Reading) -> tuple[Index, Index]:
    """The pictures that are learned and those that are held out: a share of them, or those that a file names, one in a line.

    Raises FinetuneError for a side without pictures, a file that cannot be read, names that fit no picture or several, and
    a held-out picture with a copy that is not."""
    first = originals(index, reading)
    held = drawn(index, first, fraction, seed) if files is None else listed(index, first, Path(os.path.expanduser(files)))
    return index.take(np.flatnonzero(~held)), index.take(np.flatnonzero(held))


def drawn(index: Index, first: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """(N,) whether each is held out: groups of copies, in the order of a number drawn for each, as far as they bring the
    share nearer to `fraction`."""
    digests = np.ascontiguousarray(index.digest).view("S32").ravel()
    by_group = np.lexsort((digests, first))
    groups, starts, sizes = np.unique(first[by_group], return_index=True, return_counts=True)
    if len(groups) < 2:
        raise FinetuneError("data.validation: of pictures that all show the same none can be held out")
    key = seed.to_bytes(8, "little")
    draws = [blake2b(digest, key=key, person=b"validation").digest() for digest in digests[by_group[starts]].tolist()]
    order = sorted(range(len(groups)), key=draws.__getitem__)[:-1]     # the last one is learned in any case
    wanted, count, chosen = fraction * len(index), 0, []
    for group in order:
        if abs(count + sizes[group] - wanted) < abs(count - wanted):
            chosen.append(group)
            count += sizes[group]
    return np.isin(first, groups[chosen or [min(order, key=sizes.__getitem__)]])


def listed(index: Index, first: np.ndarray, file: Path) -> np.ndarray:
    """(N,) whether each is named in the file."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "is not UTF-8"
        raise FinetuneError(f"data.validation.files: {file}: {reason}") from None
    names = [index.name(i) for i in range(len(index))]
    rows: dict[str, list[int]] = {}         # by the last part of the name
    for i, name in enumerate(names):
        rows.setdefault(basename(name), []).append(i)
    held, problems = np.zeros(len(index), bool), []
    for number, line in enumerate(lines, 1):
        if not (line := line.strip()):
            continue
        wanted = normpath(line)
        fitting = [i for i in rows.get(basename(wanted), []) if f"/{names[i]}".endswith(f"/{wanted}")]
        exact = [i for i in fitting if names[i] == wanted] or fitting
        different = list(dict.fromkeys(names[i] for i in exact))
        if not different:
            problems.append(f"{file}:{number}  there is no picture {line!r}" + nearest(
                basename(wanted), rows if len(rows) < MANY else ()))
        elif len(different) > 1:
            problems.append(f"{file}:{number}  {line!r} is {different[0]} or {different[1]}; write more of the path")
        held[exact] = True
    if not problems and held.all():
        problems.append(f"{file}: names every picture; nothing is left to learn")
    if not problems and not held.any():
        problems.append(f"{file}: names no picture")
    if not problems:
        shown = np.zeros(len(index), bool)          # by the first of a group: whether one of it is held out
        shown[first[held]] = True
        for i in np.flatnonzero(shown[first] & ~held):
            twin = np.flatnonzero(held & (first == first[i]))[0]
            problems.append(f"{names[twin]} is held out, but {names[i]} shows the same and is learned; name both, or remove "
                            "one")
    refuse(problems, "data.validation.files: cannot be followed")
    return held
