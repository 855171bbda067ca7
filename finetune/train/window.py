"""What metrics.jsonl says: a line for every few steps, one for each step that was skipped, and one for each alarm.

A step whose loss or gradient is not finite is not applied (see loop.py). Its numbers stay on the device like all others
until the line is written, so to name it costs no wait. Skipped is what was skipped: a function of the step alone, since data
and draws are, so that a resumed run skips the same."""

import json
import math
import time

import torch

from finetune import device
from finetune.disk import write_text
from finetune.errors import FinetuneError
from finetune.records import measured
from finetune.runfolder import RunFolder
from finetune.train import trackers
from finetune.train.setup import Run

GIVE_UP = 10        # skipped steps in a row
HALVINGS = 40       # in a row, of float16's scale: from the 2**16 that it begins with to 2**-24, the least that float16 holds
SHOWN = 8           # names of files in a line


class Window:
    """The steps between two lines."""

    def __init__(self, run: Run, losses: list[float] = (), norms: list[float] = (), skipped: int = 0, overflows: int = 0):
        where = run.accelerator.device
        self.run, self.begin, self.pictures = run, time.perf_counter(), 0
        self.losses, self.norms = ([torch.tensor(value, device=where) for value in values] for values in (losses, norms))
        # Steps in a row, up to the last line; GIVE_UP is final, so that a sound step after them does not hide them.
        self.skipped, self.overflows = skipped, overflows

    def add(self, loss: torch.Tensor, norm: torch.Tensor, pictures: int) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        self.pictures += pictures

    def values(self) -> dict:
        """What a checkpoint keeps, so that the log of a resumed run is that of an uninterrupted one. All processes call it."""
        return {"losses": self._losses(), "norms": [t.item() for t in self.norms], "skipped": self.skipped,
                "overflows": self.overflows}

    def _losses(self) -> list[float]:
        """The means over all processes; in float64, so that what is the same in all of them, as after a resume, stays it."""
        if not self.losses:
            return []
        return self.run.accelerator.gather(torch.stack(self.losses)[None]).cpu().double().mean(0).float().tolist()

    def close(self, done: int) -> dict[str, str]:
        """Append the lines; what the bar shows. `skipped` then counts the steps in a row that were."""
        run, accelerator = self.run, self.run.accelerator
        losses, norms, sound = self._losses(), torch.stack(self.norms).tolist(), []
        for step, (loss, norm) in enumerate(zip(losses, norms), done - len(losses)):
            # A float16 gradient that overflows is how its scale is found, and the scaler skips that step by itself.
            self.overflows = 0 if math.isfinite(norm) else self.overflows + 1
            scaling = accelerator.scaler is not None and self.overflows <= HALVINGS
            sound.append(math.isfinite(loss) and (math.isfinite(norm) or scaling))
            if not sound[-1]:
                self._skip(step, loss)
            if self.skipped < GIVE_UP:
                self.skipped = 0 if sound[-1] else self.skipped + 1
        seconds = time.perf_counter() - self.begin
        line = {"step": done, "loss": _mean(losses, sound), "grad_norm": _mean(norms, map(math.isfinite, norms)),
                "lr": run.optimizer.param_groups[0]["lr"],
                "images_per_second": round(self.pictures * accelerator.num_processes / seconds, 3),
                "memory_mb": device.memory_mb(accelerator.device)}
        write(run, line)
        self.losses, self.norms, self.begin, self.pictures = [], [], time.perf_counter(), 0
        return {"loss": "-" if line["loss"] is None else f"{line['loss']:.4f}", "lr": f"{line['lr']:.1e}",
                "img/s": f"{line['images_per_second']:.1f}", "MB": str(line["memory_mb"])}

    def _skip(self, step: int, loss: float) -> None:
        names = [stream.index.name(int(example)) for stream in self.run.loader.streams
                 for example in stream.order.examples(step)]
        what = "gradient" if math.isfinite(loss) else "loss"
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        self.run.say(f"step {step + 1} is skipped: its {what} is not finite; it saw {', '.join(names[:SHOWN])}{more}")
        write(self.run, {"step": step + 1, "skipped": names, "why": what})

    def check(self, done: int) -> None:
        """Raise FinetuneError when too many steps in a row were skipped."""
        if self.skipped >= GIVE_UP:
            raise FinetuneError(f"step {done}: {GIVE_UP} steps in a row were not finite and are skipped; the state without "
                                "them is saved. Lower train.learning_rate, or leave out the pictures that metrics.jsonl "
                                "names, and start again with --fresh")


def _mean(values: list[float], counted) -> float | None:
    some = [value for value, counts in zip(values, counted) if counts]
    return sum(some) / len(some) if some else None


def write(run: Run, line: dict) -> None:
    if run.accelerator.is_main_process:
        with open(run.folder.metrics, "a", encoding="utf-8") as f:
            f.write(json.dumps(line, ensure_ascii=False) + "\n")
        trackers.log(run.accelerator, line)


def rewind(folder: RunFolder, done: int, logged: int, say) -> None:
    """Take back what was said after `done` steps, and of losses what was said after `logged`, since the checkpoint has those
    in between. What a kill left of a line goes too; one that is damaged is named."""
    if folder.metrics.exists():
        kept = []
        for line in folder.metrics.read_bytes().splitlines(keepends=True):
            try:
                said = measured(line)
                if line.endswith(b"\n") and said["step"] <= (logged if "loss" in said or "skipped" in said else done):
                    kept.append(line.decode())
            except ValueError:
                say(f"{folder.metrics.name}: a damaged line is left out")
        write_text(folder.metrics, "".join(kept))
