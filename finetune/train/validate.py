"""The loss on held-out pictures, at the same noise levels with the same noise each time.

So two values of a run differ by what was trained between them and by nothing else, and what is said beside the mean is the
mean of these differences to the untouched base, picture by picture, with its standard error."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from finetune.batch import Batch
from finetune.diffusion.timesteps import quantiles
from finetune.train.best import history, note
from finetune.train.preview import resting
from finetune.train.setup import Run, to_device

LEVELS = 8      # quantiles of the law that timesteps are trained by


def validate(run: Run, done: int) -> None:
    """Append the line to metrics.jsonl, unless it is there. It draws nothing that training draws, and changes no bit of it."""
    if run.accelerator.is_main_process and done not in history(run.folder, "validation_loss"):
        if run.base_losses is None:
            with run.method.at(0):
                run.base_losses = losses(run)
        with run.ema.swapped() if run.ema else nullcontext():
            now = losses(run) if done else run.base_losses
            gain = (now - run.base_losses).mean(1)
            note(run, done, {"validation_loss": now.mean().item(), "validation_levels": now.mean(0).tolist(),
                             "validation_gain": gain.mean().item(),
                             "validation_gain_error": (gain.std() / len(gain) ** 0.5).item() if len(gain) > 1 else None})
    run.accelerator.wait_for_everyone()


@torch.no_grad()
def losses(run: Run) -> Tensor:
    """Each held-out picture's loss at each level, (N, levels) float64, before any weight."""
    found = []
    with resting(run.family.parts), run.accelerator.autocast():
        for batch in batches(run):
            levels = [objective(run.family, batch, run.recipe.train.seed).per_example for objective in at_levels(run)]
            found.append(torch.stack(levels, 1).double().cpu())
    return torch.cat(found)


def batches(run: Run) -> Iterator[Batch]:
    stream, size = run.validation, run.recipe.train.batch_size
    for step in range(stream.order.steps):
        for first in range(0, stream.order.size, size):
            if chosen := stream.positions(step, range(first, min(first + size, stream.order.size))):
                yield to_device(stream.batch(chosen, 1.0), run.accelerator.device)


def at_levels(run: Run) -> list:
    """The objective with its timestep fixed at each level; to decode has no levels."""
    if run.method.objective != "denoise":
        return [run.objective]
    law = run.objective.law
    return [replace(run.objective, law=partial(lambda u, level: law(torch.full_like(u, level)), level=level), strata=1)
            for level in quantiles(LEVELS).tolist()]
