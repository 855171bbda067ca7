"""What a run sees does not depend on how it is split: over workers, over batches × accumulation, over processes.

    python scripts/faults/stream.py [--draws 10000]

A draw is an example with its crop, mirroring and caption, its timestep and its noise. Each is made by the run's own loader and
objective, with encoders and a denoiser that cost nothing, and compared with that of one batch in one process without workers.
Then real runs are trained: over workers they give the same adapter, checkpoint and log, over splits and with two processes
the same weights up to rounding. Prints N/N.
"""

import argparse
import hashlib
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])]
from harness import Case, reference, restarted  # noqa: E402

WORKERS, SPLITS = (1, 2, 4), ((2, 2, 1), (1, 4, 1), (2, 1, 2))       # batch size, accumulation, processes
MOST = 1e-6     # relative difference of the weights of two splits


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=10000)
    args = parser.parse_args(arguments)
    restarted()
    with tempfile.TemporaryDirectory(prefix="stream-") as folder:
        place = Path(folder)
        words = (f"data.images={{path: {place}/given/pictures, repeats: 5}}", "data.crop=random", "data.flip=true",
                 "data.caption={template: [{template: '{text}'}, {template: 'sks {text}'}], dropout: 0.3}",
                 "train.batch_size=4", "train.gradient_accumulation=1", "train.max_steps=6", "data.workers=0",
                 "every.preview=0", "every.checkpoint=0", "train.learning_rate=1e-4",
                 "method.dropout=0")        # which draws for each batch
        recipe, _, wanted, _ = reference("lora", place, words)
        same = sum(trained(place, recipe, words, f"data.workers={workers}") == wanted for workers in WORKERS)
        far = [apart(place, recipe, words, *split) for split in SPLITS]
        draws, different = streams(recipe, words, args.draws)       # last: what has used torch should not be forked
    print(f"{same}/{len(WORKERS)} runs are the same to the last bit with {WORKERS} workers")
    print(f"{sum(one <= MOST for one in far)}/{len(far)} splits {SPLITS} have the same weights but for {max(far):.1e}")
    print(f"{draws - different}/{draws} draws are the same over splits, processes and workers")
    return bool(different or same < len(WORKERS) or max(far) > MOST)


def trained(place: Path, recipe: Path, words: tuple[str, ...], *more: str, first=lambda: None) -> dict[str, str]:
    """What comes out of a run with more words."""
    case = Case(place / "case", recipe, (*words, *more))
    shutil.rmtree(case.place, ignore_errors=True)
    end = case.start(first=first)
    assert end.code == 0, end.said
    return case.outcome()


def apart(place: Path, recipe: Path, words: tuple[str, ...], batch: int, accumulation: int, processes: int) -> float:
    """The relative difference of the weights of a split run."""
    import torch

    from finetune.artifact import read_tensors

    trained(place, recipe, words, f"train.batch_size={batch}", f"train.gradient_accumulation={accumulation}",
            first=twice if processes == 2 else lambda: None)
    whole, split = (read_tensors(place / case / "run" / "adapter" / "lora.safetensors") for case in ("whole", "case"))
    whole, split = (torch.cat([tensors[name].flatten() for name in sorted(whole)]) for tensors in (whole, split))
    return ((split - whole).norm() / whole.norm()).item()


def twice() -> None:
    """Become two processes that know of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "ACCELERATE_USE_CPU": "true"}
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if os.fork() else "1"


def streams(recipe: Path, words: tuple[str, ...], count: int) -> tuple[int, int]:
    """The number of draws, at least `count`, and of those that are other ones for some split or number of workers."""
    from accelerate import Accelerator

    from finetune.recipe import load
    from finetune.train import ground

    base = ground.load(load(str(recipe), list(words)).recipe, Accelerator(cpu=True), lambda line: None)
    order = base.streams[0].order
    steps = -(-count * order.steps // len(order.slots))
    wanted, different = drawn(base, steps, 4, 1, 1, 0), set()
    for workers, split in [*((workers, (4, 1, 1)) for workers in WORKERS), *((2, split) for split in SPLITS)]:
        found = drawn(base, steps, *split, workers)
        different |= {position for position in wanted.keys() | found.keys() if wanted.get(position) != found.get(position)}
    return len(wanted), len(different)


def drawn(base, steps: int, batch_size: int, accumulation: int, processes: int, workers: int) -> dict[int, tuple]:
    """Position → what is drawn there."""
    from torch.nn.functional import avg_pool2d

    from finetune.data.loader import Loader
    from finetune.objectives.denoise import Denoise

    def denoise(noisy, *_):
        seen.extend(map(digest, noisy))
        return noisy

    found, seen = {}, []
    family = SimpleNamespace(path=base.family.path, stride=base.family.stride, latents=base.family.latents,
                             encode_text=lambda captions: None, denoise=denoise,
                             moments=lambda pixels: avg_pool2d(pixels, 2).repeat(1, 3, 1, 1)[:, :8])
    for process in range(processes):
        for batches in Loader(base.streams, batch_size, accumulation, process, processes, workers).run(range(steps)):
            for batch in (batch for batch in batches if batch.share):       # 0: it only takes part
                seen.clear()
                times = Denoise()(family, batch, base.streams[0].order.seed).timesteps.tolist()
                found |= {position: draw for position, *draw in zip(batch.positions, map(digest, batch.pixels), batch.captions,
                                                                    batch.geometry.tolist(), times, seen)}
    return found


def digest(tensor) -> bytes:
    return hashlib.sha256(tensor.numpy().tobytes()).digest()


if __name__ == "__main__":
    sys.exit(main())
