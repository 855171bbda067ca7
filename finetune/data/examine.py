"""Every picture decoded in full once: a file that is cut off must be found before training, not in it."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from hashlib import sha256
from multiprocessing import get_context

import numpy as np
import pyarrow as pa
from PIL import Image
from tqdm import tqdm

from finetune.data.memory import Found, portions
from finetune.data.pictures import SUFFIXES, Reading, UnreadablePicture, difference_hashes, read, shrunk, suffixes
from finetune.errors import FinetuneError

FACTS = pa.schema([("digest", pa.binary(32)), ("width", pa.int32()), ("height", pa.int32()), ("phash", pa.uint64()),
                   ("suffix", pa.large_string()),       # that fits its content, where its own does not
                   ("reason", pa.large_string())])      # why it cannot be read; null if it can
FEW = 200           # are decoded here: starting processes would take longer
PORTION = 256       # pictures that a process is given at once, at most
PORTION_BYTES = 2**24
MANY = 8            # processes at most
KILLED = "reading it ended the process: the decoder crashed, or the memory is full"

NO_PICTURE = Image.new("RGB", (1, 1))

Task = Callable[[np.ndarray], tuple]        # rows -> the arguments of `examine`


def examine(place, how: Reading, rows: pa.RecordBatch) -> tuple[pa.RecordBatch, list[bool]]:
    """The facts about these pictures, and whether they will stay so for as long as the file does."""
    rows = list(zip(*(column.to_pylist() for column in rows.columns)))
    place.soon(rows)
    digest, width, height, small, suffix, reason, lasting = map(list, zip(*(fact(place, how, row) for row in rows)))
    return pa.record_batch([digest, width, height, difference_hashes(small), suffix, reason], schema=FACTS), lasting


def fact(place, how: Reading, row: tuple) -> tuple:
    digest = bytes(32)
    try:
        data = place.read(*row)
        digest = sha256(data).digest()
        image = read(data, "", how)
        own, fitting = os.path.splitext(os.fsdecode(row[0]))[1].lower(), suffixes(data)
        other = fitting[0] if own in SUFFIXES and own not in fitting else None
        return digest, image.width, image.height, shrunk(image), other, None, True
    except UnreadablePicture as e:
        return digest, 0, 0, NO_PICTURE, None, e.reason, not isinstance(e.__context__, MemoryError)
    except OSError as e:
        return digest, 0, 0, NO_PICTURE, None, e.strerror or str(e), False
    except MemoryError:
        return digest, 0, 0, NO_PICTURE, None, "there is not enough memory for it", False


def examined(place, listed: pa.Table, how: Reading, rows: np.ndarray, quiet: bool) -> Iterator[Found]:
    """The facts about some rows of a list, as they come; a portion at a time, in no order."""
    places = listed.select(["name", "part", "offset", "size"]).combine_chunks()
    size = np.mean(listed["size"].to_numpy()[rows]) if len(rows) else 0
    portion = int(np.clip(PORTION_BYTES / size if size else PORTION // 16, 1, PORTION))     # 0: nobody knows

    def task(some: np.ndarray) -> tuple:
        rows = places.take(some).to_batches()[0]
        return place.portable(rows), how, rows

    with tqdm(total=len(rows), desc="read pictures", unit="img", disable=quiet or len(rows) < FEW, leave=False) as bar:
        for some, batch, lasting in (here if len(rows) < FEW else elsewhere)(portions(rows, portion), task):
            bar.update(len(some))
            yield some, batch, lasting


def here(tasks: list[np.ndarray], task: Task) -> Iterator[Found]:
    for some in tasks:
        yield some, *examine(*task(some))


def elsewhere(tasks: list[np.ndarray], task: Task) -> Iterator[Found]:
    """By as many processes as there are cores. When one dies, what it may have died of is looked at once more, picture by
    picture in one process; what ends that too cannot be read. Raises FinetuneError when no process lives."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting, suspects = deque(tasks), deque()
    while todo := suspects or waiting:
        running: dict[Future, np.ndarray] = {}
        with processes(1 if todo is suspects else min(cores, MANY)) as workers:
            try:
                workers.submit(int).result()
            except BrokenProcessPool:
                raise FinetuneError("no process can be started to read pictures: the memory is full, or processes are "
                                    "limited on this machine") from None
            try:
                while todo or running:
                    while todo and len(running) < (1 if todo is suspects else 3 * cores):
                        running[workers.submit(examine, *task(todo[0]))] = todo[0]
                        todo.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        batch = future.result()
                        yield running.pop(future), *batch
            except BrokenProcessPool:
                lost = [one for some in running.values() for one in portions(some, 1)]
                if todo is waiting:
                    suspects.extend(lost)
                else:
                    yield lost[0], pa.record_batch([[bytes(32)], [0], [0], [0], [None], [KILLED]], schema=FACTS), [False]


@contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that leave Ctrl-C to this one."""
    workers = ProcessPoolExecutor(count, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield workers
    finally:
        workers.shutdown(cancel_futures=True)
