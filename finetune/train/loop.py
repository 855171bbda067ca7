"""The loop: every method, family and objective goes through here."""

import json
import math
import signal
import time
from contextlib import nullcontext
from dataclasses import replace

import torch
from tqdm import tqdm

from finetune import device
from finetune.batch import Batch, Conditioning
from finetune.errors import FinetuneError
from finetune.optim.optimizer import load_state, state_tensors
from finetune.optim.schedule import factor
from finetune.runfolder import write_text
from finetune.train import checkpoint
from finetune.train.preview import generate, grid, resting
from finetune.train.setup import Run, seed_step


class Stopped(Exception):
    """A signal asked for the end; everything is saved."""

    def __init__(self, number: int):
        self.number = number


def train(run: Run, start: int, window: "Window") -> None:
    """Steps `start` … max_steps − 1, with logs, previews and checkpoints on the way; a checkpoint at the end.

    Raises Stopped after saving when SIGTERM or SIGINT came, FinetuneError when the numbers are no longer finite."""
    recipe, accelerator, main = run.recipe, run.accelerator, run.accelerator.is_main_process
    every, last = recipe.every, recipe.train.max_steps
    stop = Stop()
    bar = tqdm(total=last, initial=start, unit="step", disable=not main, dynamic_ncols=True)
    if start == 0 and every.preview:
        preview(run, 0)
    for step, batches in zip(range(start, last), run.loader.run(range(start, last))):
        window.add(*one_step(run, step, batches), sum(len(batch.positions) for batch in batches))
        done = step + 1
        bar.update()
        if done % every.log == 0 or done == last:
            bar.set_postfix(window.close(done), refresh=False)
        stopped = stop.received(accelerator)
        if done == last or stopped or (every.checkpoint and done % every.checkpoint == 0):
            save(run, done, window)
        if every.preview and done % every.preview == 0:
            preview(run, done)
        if stopped and done < last:
            bar.close()
            raise Stopped(stopped)
    bar.close()


def one_step(run: Run, step: int, batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over this process's batches, whose losses are summed up. Returns the sum and the norm of the
    gradient, both still on the device."""
    recipe, accelerator = run.recipe.train, run.accelerator
    run.model.train()
    run.optimizer.train()
    for group in run.optimizer.param_groups:
        group["now"] = step
        group["lr"] = 0.0 if step >= group["until"] else group["peak_lr"] * factor(
            step=step, max_steps=recipe.max_steps, warmup_steps=recipe.warmup_steps,
            **recipe.schedule.model_dump(exclude_none=True))
    total = torch.zeros((), device=accelerator.device)
    for batch in batches:
        seed_step(recipe.seed, batch.positions[0])
        with nullcontext() if batch is batches[-1] else accelerator.no_sync(run.model):
            loss = run.model(to_device(batch, accelerator.device))
            accelerator.backward(loss)
        total += loss.detach()
    norm = accelerator.clip_grad_norm_(run.parameters.values(), recipe.clip_norm or float("inf"))
    run.optimizer.step()
    run.method.after_step()
    run.optimizer.eval()        # between steps the parameters are what is shown and saved; schedule-free steps elsewhere
    run.optimizer.zero_grad()
    if run.ema:
        run.ema.update(step)
    return total, norm


def to_device(batch: Batch, where: torch.device) -> Batch:
    def move(t):
        return None if t is None else t.to(where, non_blocking=True)

    text = (told := batch.conditioning) and Conditioning(move(told.tokens), move(told.pooled), move(told.mask))
    return replace(batch, weight=move(batch.weight), geometry=move(batch.geometry), pixels=move(batch.pixels),
                   latents=move(batch.latents), mask=move(batch.mask), beside=move(batch.beside), conditioning=text)


class Window:
    """The steps between two log lines. Losses stay on the device until the line is written: no wait at every step."""

    def __init__(self, run: Run, losses: list[float] = (), norms: list[float] = ()):
        where = run.accelerator.device
        self.run, self.begin, self.pictures = run, time.perf_counter(), 0
        self.losses, self.norms = ([torch.tensor(value, device=where) for value in values] for values in (losses, norms))

    def add(self, loss: torch.Tensor, norm: torch.Tensor, pictures: int) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        self.pictures += pictures

    def values(self) -> dict[str, list[float]]:
        """What a checkpoint keeps, so that the log of a resumed run is that of an uninterrupted one."""
        return {"losses": [t.item() for t in self.losses], "norms": [t.item() for t in self.norms]}

    def close(self, done: int) -> dict[str, str]:
        """Append the line to metrics.jsonl; what the bar shows. Raises FinetuneError for a loss that is not finite."""
        run, accelerator = self.run, self.run.accelerator
        loss = accelerator.reduce(torch.stack(self.losses).mean(), "mean").item()
        if not math.isfinite(loss):
            raise FinetuneError(f"step {done}: the loss is not finite; nothing of it is saved, the last checkpoint stays. "
                                "Lower train.learning_rate and start again with --fresh")
        seconds = time.perf_counter() - self.begin
        norm = torch.stack(self.norms).mean().item()
        line = {"step": done, "loss": loss, "grad_norm": norm if math.isfinite(norm) else None,
                "lr": run.optimizer.param_groups[0]["lr"],
                "images_per_second": round(self.pictures * accelerator.num_processes / seconds, 3),
                "memory_mb": device.memory_mb(accelerator.device)}
        if accelerator.is_main_process:
            with open(run.folder.metrics, "a") as f:
                f.write(json.dumps(line) + "\n")
        self.losses, self.norms, self.begin, self.pictures = [], [], time.perf_counter(), 0
        return {"loss": f"{loss:.4f}", "lr": f"{line['lr']:.1e}", "img/s": f"{line['images_per_second']:.1f}",
                "MB": str(line["memory_mb"])}


class Stop:
    """SIGTERM and SIGINT finish the running step and save; a second one ends the process at once."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def received(self, accelerator) -> int:
        """The signal that any process got, or 0: all processes stop after the same step."""
        if accelerator.num_processes == 1:
            return self.number
        return int(accelerator.gather(torch.tensor([self.number], device=accelerator.device)).max())


def save(run: Run, done: int, window: Window) -> None:
    """A checkpoint after `done` steps, by the main process. Raises FinetuneError for parameters that are not finite."""
    parameters = {name: p.detach().cpu().clone() for name, p in run.parameters.items()}
    if bad := [name for name, p in parameters.items() if not p.isfinite().all()]:
        raise FinetuneError(f"step {done}: {len(bad)} parameters are not finite ({bad[0]}); nothing of it is saved, the last "
                            "checkpoint stays. Lower train.learning_rate and start again with --fresh")
    if run.accelerator.is_main_process:
        tensors, plain = state_tensors(run.optimizer.optimizer)
        scaler = run.accelerator.scaler         # float16 alone has one, and its scale is history that a resume needs
        plain = {"state": plain, "scaler": scaler and scaler.state_dict(), "window": window.values()}
        state = checkpoint.State(done, parameters, tensors, plain,
                                 {n: t.cpu() for n, t in run.ema.average.items()} if run.ema else None)
        checkpoint.save(run.folder, state, run.recipe.train.keep_checkpoints)
    run.accelerator.wait_for_everyone()


def resume(run: Run) -> tuple[int, Window]:
    """Put back the newest valid checkpoint. Returns the number of steps that are done, and those not logged yet."""
    state = checkpoint.newest(run.folder, run.say, tidy=run.accelerator.is_main_process)
    if state is None:
        if run.accelerator.is_main_process:
            run.folder.metrics.unlink(missing_ok=True)
        return 0, Window(run)
    run.method.restore(state.parameters)
    load_state(run.optimizer.optimizer, state.optimizer, state.plain["state"])
    if run.accelerator.scaler:
        run.accelerator.scaler.load_state_dict(state.plain["scaler"])
    if run.ema:
        for name, average in run.ema.average.items():
            average.copy_(state.ema[name])
    if run.accelerator.is_main_process and run.folder.metrics.exists():
        lines = run.folder.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]     # a killed process may have left half a line
        write_text(run.folder.metrics, "".join(line for line in whole if json.loads(line)["step"] <= state.step))
    return state.step, Window(run, **state.plain["window"])


def preview(run: Run, done: int) -> None:
    """A grid of the base beside what is trained so far. Changes no bit of the training: it draws from its own seeds."""
    if run.accelerator.is_main_process:
        p = run.recipe.preview
        jobs = [(prompt, seed) for prompt in p.prompts for seed in p.seeds]
        size = (run.recipe.data.resolution,) * 2
        with resting(run.family.parts):
            pipeline = run.family.pipeline()
            if run.base_pictures is None:
                with run.method.at(0):
                    run.base_pictures = list(generate(pipeline, jobs, p.steps, p.guidance, size=size, say="preview of the base"))
            with run.ema.swapped() if run.ema else nullcontext():
                now = list(generate(pipeline, jobs, p.steps, p.guidance, size=size, say=f"preview at step {done}"))
        rows = [list(pair) for pair in zip(run.base_pictures, now)]
        grid(rows, [f"{prompt} · {seed}" for prompt, seed in jobs], ["base", f"step {done}"]).save(run.folder.preview(done))
    run.accelerator.wait_for_everyone()
