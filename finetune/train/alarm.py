"""Training that does nothing, told early: a wrong target or a rate of nearly zero would else be seen after hours."""

import torch
from torch import Tensor

from finetune.train.preview import resting
from finetune.train.setup import Run, seed_step, to_device

AFTER = 20      # steps
LOOKED_AT = 8   # steps whose loss is compared with the base's


def traces(parameters: dict[str, Tensor]) -> list[float]:
    """A number for each tensor that is another one when the tensor has moved."""
    return torch.stack([p.detach().double().square().sum() + p.detach().double().sum() for p in parameters.values()]).tolist()


def alarms(run: Run, before: list[float], done: int, norm: Tensor) -> list[str]:
    """What is wrong after `done` steps, where `before` are the traces of all parameters at the start and `norm` is that of
    the last gradient."""
    found, then = [], dict(zip(run.parameters, before))
    if norm.item() == 0:
        found.append("the gradient is zero")
    for method in run.method.methods:
        own = method.parameters()
        if traces(own) == [then[name] for name in own]:
            found.append(f"what {method.kind} trains has not moved")
    if not any(differs(run, step) for step in range(min(done, LOOKED_AT))):
        found.append("the loss is the base's to the last bit")
    return [f"ALARM after {done} steps: {text}; the run learns nothing. Look at train.learning_rate and the method's targets"
            for text in found]


@torch.no_grad()
def differs(run: Run, step: int) -> bool:
    """Whether the loss of a step is another one than the base's. A caption may lack what is learned, so one may not be."""
    model, losses = run.accelerator.unwrap_model(run.model), []
    batches = [to_device(batch, run.accelerator.device) for batch in run.loader.batches(step)]
    with resting(run.family.parts):
        for strength in (1, 0):
            with run.method.at(strength):
                for batch in batches:
                    seed_step(run.recipe.train.seed, batch.positions[0])
                    losses.append(model(batch))
    now, base = torch.stack(losses).view(2, -1).tolist()
    return now != base
