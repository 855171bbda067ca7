"""Print how fast data comes: pictures decoded, the cache written and read, batches delivered, a million entries found.

    python scripts/bench_data.py [--examples 1000] [--million 1000000]

Everything is made up and lies in a temporary folder; the shapes are those of SD 1.5 at 512 pixels: moments of
8 × 64 × 64 and text states of 77 × 768, both float32. Reads come from the warm file cache.
"""

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from finetune.batch import Conditioning
from finetune.data import cache
from finetune.data.cache import Cache, Rows, key
from finetune.data.loader import CENTRE, Encoded, Loader, View
from finetune.data.pixels import fit, plan_crop, read
from finetune.data.scan import Example

VIEW = View(512, False, False, "{text}", 0.0)
MOMENTS, STATES = torch.randn(8, 64, 64), torch.randn(1, 77, 768)
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--million", type=int, default=1_000_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pictures(Path(folder))
        examples(Path(folder) / "cache", args.examples)
        million(Path(folder) / "million", args.million)


def pictures(folder: Path) -> None:
    """Decode and resize, on one core."""
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((1600, 1200)).save(folder / "x.jpg", quality=92)

    def one() -> None:
        image = read(folder / "x.jpg")
        fit(image, plan_crop(image.width, image.height, VIEW.resolution, CENTRE), False)

    tell("pictures decoded and fitted, JPEG 1600 × 1200 to 512", 20, once(lambda: [one() for _ in range(20)]))


def examples(folder: Path, count: int) -> None:
    """Write entries, read them, deliver batches."""
    def rows(kind: str, name: str, tensor: torch.Tensor) -> Rows:
        return Rows(Cache(folder), kind, (key(kind, n) for n in range(count)), lambda _: {name: tensor}).fill(True, "")

    def entries(n: int) -> None:
        moments[n], text[n]

    write = once(lambda: (rows("moments", "moments", MOMENTS), rows("text", "tokens", STATES)))
    tell("examples written", count, write)
    moments, text = rows("moments", "moments", MOMENTS), rows("text", "tokens", STATES)
    loader = Loader([Example(Path("x"), {"text": str(n)}, "", 512, 512) for n in range(count)], VIEW, 0, Encoded(
        lambda n, mirrored: moments[n]["moments"], lambda caption: Conditioning(**text[int(caption)]),
        lambda moments, noise: moments[:, :4] + noise))
    batches = [list(range(n, n + BATCH)) for n in range(0, count - BATCH + 1, BATCH)]
    for threads in (1, 2):
        with ThreadPoolExecutor(threads) as pool:
            wall = once(lambda: list(pool.map(entries, range(count))))
            tell(f"examples read and checked, threads: {threads}", count, wall)
            wall = once(lambda: list(pool.map(lambda batch: loader.batch(batch) and None, batches)))
            tell(f"examples delivered in batches of {BATCH}, noise drawn, threads: {threads}", len(batches) * BATCH, wall)


def million(folder: Path, count: int) -> None:
    """Find all of a million entries: indexes alone, in as many shards as their data would need."""
    folder.mkdir()
    rows = np.zeros(count, cache.ROW)
    shared, keys = key("vae"), []
    wall = once(lambda: keys.extend(key(shared, f"{n:064d}", 0) for n in range(count)))
    tell("keys made", count, wall)
    rows["key"], rows["bytes"] = keys, 1
    for number, part in enumerate(np.array_split(rows, 1 + count * MOMENTS.nbytes // cache.SHARD_BYTES)):
        (folder / f"x-{number:020d}.index").write_bytes(part.tobytes())
        (folder / f"x-{number:020d}.data").write_bytes(b"x")
    before = psutil.Process().memory_info().rss
    wall = once(lambda: Rows(Cache(folder), "x", keys, None))
    more = (psutil.Process().memory_info().rss - before) / 2**20
    tell(f"entries found ({len(list(folder.iterdir()))} files, {more:,.0f} MiB more memory)", count, wall)


def once(work) -> float:
    """Seconds that it takes; what it gives is dropped."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def tell(what: str, count: int, seconds: float) -> None:
    print(f"{count / seconds:12,.0f} a second   {what}, {seconds:.2f} s", flush=True)


if __name__ == "__main__":
    main()
