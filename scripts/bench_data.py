"""Print how fast data comes: pictures read and encoded, batches delivered, a million examples found.

    python scripts/bench_data.py [SIZE]

Everything is made up and lies in a temporary folder. The shapes are those of SD 1.5 at 512 pixels: moments of 8 × 64 × 64
and text states of 77 × 768, both float32. The million (or SIZE) are PNG files of 8 × 8 pixels with a metadata.jsonl; each
start is a process of its own, so that its memory can be told, and finds in the file cache what the system left there.
On a machine that does other work too, compare the CPU seconds.
"""

import argparse
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from finetune.batch import Conditioning
from finetune.data.buckets import assign, sizes
from finetune.data.cache import Cache, Rows, key
from finetune.data.captions import Captions
from finetune.data.encode import keys
from finetune.data.index import build
from finetune.data.loader import Encoded, Loader, Stream, View
from finetune.data.order import Order
from finetune.data.pictures import Reading, read
from finetune.data.pixels import fit, plan_crop
from finetune.recipe.data import Images

VIEW = View(Reading(), False, False, None, 0.0, 8)
CAPTIONS = Captions((("{text}", 1.0),))
torch.set_num_threads(1)
MOMENTS, STATES = torch.randn(8, 64, 64), torch.randn(1, 77, 768)
BATCH = 8
EXAMPLES = 1000     # encoded ones


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", type=int, nargs="?", default=1_000_000, help="files to find instead of a million")
    size = parser.parse_args().size
    begin, load = time.perf_counter(), os.getloadavg()[0]
    tell("", "measured", "goal")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FINETUNE_CACHE"] = f"{folder}/cache"
        repeats()
        pictures(Path(folder))
        examples(Path(folder) / "cache", EXAMPLES)
        million(Path(folder) / "million", size)
    print(f"{(time.perf_counter() - begin) / 60:.1f} minutes on {os.cpu_count()} cores; "
          f"load {load:.1f} before, {os.getloadavg()[0]:.1f} after")


def repeats() -> None:
    """Count how often each of 999 examples in 5 buckets is seen in three epochs at batch 4."""
    rng = np.random.default_rng(0)
    bucket, wanted = rng.integers(0, 5, 999), rng.integers(1, 4, 999)
    order = Order(bucket, wanted, 4, 0)
    exact = 0
    for epoch in range(3):
        seen = Counter(np.concatenate([order.examples(epoch * order.steps + step) for step in range(order.steps)]).tolist())
        exact += seen == dict(enumerate(wanted.tolist()))
    tell("epochs that show 999 examples exactly their repeats, 5 buckets, batch 4", f"{exact} of 3", "3 of 3")


def pictures(folder: Path) -> None:
    """Decode and resize on one core, and encode with a VAE of SD 1.5's size and random weights on two."""
    from diffusers import AutoencoderKL

    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((1600, 1200)).save(folder / "x.jpg", quality=92)
    data = (folder / "x.jpg").read_bytes()

    def one() -> torch.Tensor:
        image = read(data, "x.jpg")
        return fit(image, plan_crop(image.width, image.height, (512, 512)), False)

    rate("pictures decoded and fitted on a core, JPEG 1600 × 1200 to 512", 20, once(lambda: [one() for _ in range(20)]),
         "more than are encoded")
    blocks = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    vae = AutoencoderKL(3, 3, *blocks, (128, 256, 512, 512), 2, latent_channels=4).eval()
    torch.set_num_threads(2)
    with torch.no_grad():
        rate("of these encoded by the VAE on two cores", 2, once(lambda: [vae.encode(one()[None]) for _ in range(2)]))
    torch.set_num_threads(1)


def examples(folder: Path, count: int) -> None:
    """Write entries, read them, deliver batches."""
    def rows(kind: str, name: str, tensor: torch.Tensor) -> Rows:
        return Rows(Cache(folder), kind, (key(kind, n) for n in range(count)), lambda _: {name: tensor}).fill(True, "")

    def entries(n: int) -> None:
        moments[n], text[n]

    write = once(lambda: (rows("moments", "moments", MOMENTS), rows("text", "tokens", STATES)))
    rate("examples written", count, write)
    moments, text = rows("moments", "moments", MOMENTS), rows("text", "tokens", STATES)
    encoded = Encoded(lambda n, mirrored: moments[n], lambda caption: Conditioning(**text[int(caption)]),
                      lambda moments, noise: moments[:, :4] + noise)
    squares = np.full(count, 512)
    index = SimpleNamespace(width=squares, height=squares, columns=lambda n: {"text": str(n)})
    stream = Stream(index, np.stack([squares] * 2, 1), CAPTIONS, VIEW,
                    Order(np.zeros(count, int), np.ones(count, int), BATCH, 0), encoded)
    steps = count // BATCH
    for workers in (1, 2):
        with ThreadPoolExecutor(workers) as pool:
            wall = once(lambda: list(pool.map(entries, range(count))))
            rate(f"examples read and checked, threads: {workers}", count, wall)
        wall = once(lambda: [None for _ in Loader([stream], BATCH, 1, 0, 1, workers).run(range(steps))])
        rate(f"examples delivered in batches of {BATCH}, noise drawn, workers: {workers}", steps * BATCH, wall,
             "≥ 2,000 a second" if workers == 2 else "")


def million(folder: Path, count: int) -> None:
    """Index that many files, twice, and deliver the first batch of fake latents. The goals are those for a million."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    for n in range(count):
        where = folder / f"{n // 1000:04d}"
        if n % 1000 == 0:
            where.mkdir(parents=True)
        rows = n.to_bytes(24, "little") * 8
        body = zlib.compress(b"".join(b"\0" + rows[i * 24:(i + 1) * 24] for i in range(8)), 1)
        (where / f"{n:07d}.png").write_bytes(head + chunk(b"IDAT", body) + chunk(b"IEND", b""))
    with open(folder / "metadata.jsonl", "w") as file:
        for n in range(count):
            file.write(json.dumps({"file_name": f"{n // 1000:04d}/{n:07d}.png", "text": f"number {n}"}) + "\n")
    for which in ("first", "next"):
        # not as a script: the processes that decode would run it too, and import torch
        code = f"import bench_data; bench_data.start({which!r}, {str(folder)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)


def start(which: str, folder: str) -> None:
    """Index a folder and deliver the first batch, in this process."""
    index = None

    def look() -> None:
        nonlocal index
        index = build([Images(path=folder)], Reading(), None, print, True)

    wall = once(look)
    own, workers = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    tell(f"{which} start: {len(index):,} examples indexed", f"{wall:.1f} s", "≤ 60 s" if which == "first" else "≤ 5 s")
    spent = own.ru_utime + own.ru_stime + workers.ru_utime + workers.ru_stime
    tell(f"{which} start: CPU seconds until then, with imports", f"{spent:.1f} s")
    stream = None

    def first() -> None:
        nonlocal stream
        fitted = assign(index.height, index.width, sizes(512, 64))
        Rows(Cache(Path(os.environ["FINETUNE_CACHE"]) / "encoded"), "moments", keys(index, fitted, VIEW, "vae"), None)
        encoded = Encoded(lambda n, mirrored: {"moments": MOMENTS}, lambda caption: Conditioning(STATES),
                          lambda moments, noise: moments[:, :4] + noise)
        stream = Stream(index, fitted, CAPTIONS, VIEW,
                        Order(np.zeros(len(index), int), index.repeats, BATCH, 0), encoded)
        next(Loader([stream], BATCH, 1, 0, 1, 0).run(range(3)))

    tell(f"{which} start: first batch, keys of all latents made", f"{once(first):.1f} s", "≤ 5 s")
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    tell(f"{which} start: resident at most", f"{peak / 1024:,.0f} MiB", "≤ 1,024 MiB")


def once(work) -> float:
    """Seconds that it takes; what it gives is dropped."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def rate(what: str, count: int, seconds: float, goal: str = "") -> None:
    tell(what, f"{count / seconds:,.1f} a second", goal)


def tell(what: str, measured: str, goal: str = "") -> None:
    print(f"{what:72}{measured:>20}   {goal}".rstrip(), flush=True)


if __name__ == "__main__":
    main()
