"""The best step of a run, and how long ago it was: by the loss on held-out pictures, or by a metric of the previews."""

import math
from collections.abc import Mapping

from torch import Tensor

from finetune import registry
from finetune.artifact import read_tensors, write_safetensors
from finetune.errors import FinetuneError
from finetune.header import read_header
from finetune.recipe import Recipe
from finetune.runfolder import RunFolder
from finetune.train.setup import Run
from finetune.train.stop import most
from finetune.train.window import write


def criterion(recipe: Recipe) -> tuple[str, int]:
    """What lines of metrics.jsonl call it, and 1 where less is better, −1 where more is."""
    word = recipe.train.keep_best
    if isinstance(word, bool):
        return "validation_loss", 1
    return word, -1 if registry.find("metrics", word).BETTER == "higher" else 1


def history(folder: RunFolder, key: str) -> dict[int, float]:
    """Step → what metrics.jsonl says of it under that name."""
    return {line["step"]: line[key] for line in folder.logged() if line.get(key) is not None}


def best(run: Run, new: Mapping[int, float] = {}) -> int | None:
    """The first of the best steps, with what is not in the log yet. Neither the base itself nor a number that is not finite
    is a candidate."""
    key, sign = criterion(run.recipe)
    found = {step: sign * value for step, value in (history(run.folder, key) | new).items() if step and math.isfinite(value)}
    return min(found, key=found.get) if found else None


def note(run: Run, done: int, line: Mapping[str, object]) -> None:
    """Append what was measured to metrics.jsonl, and keep the parameters if they are the best so far: these first, for what
    the log has is not measured again."""
    key = criterion(run.recipe)[0]
    if run.recipe.train.keep_best and key in line and best(run, {done: line[key]}) == done:
        found = {name: p.detach().cpu() for name, p in run.method.parameters().items()}
        write_safetensors(run.folder.best, found, {"step": str(done)})
    write(run, {"step": done} | line)


def kept(run: Run) -> tuple[int, dict[str, Tensor]]:
    """The best step and its parameters. Raises FinetuneError when there is none, or the file is not of that step."""
    key, file = criterion(run.recipe)[0], run.folder.best
    if (step := best(run)) is None:
        raise FinetuneError(f"train.keep_best: {run.folder.metrics} has no step whose {key} is finite, so none is the best")
    if not file.exists() or read_header(file).metadata.get("step") != str(step):
        raise FinetuneError(f"{file} does not hold step {step}, which is the best by the {key} in {run.folder.metrics.name}; "
                            "the adapter of the last step is written, and --fresh starts anew")
    return step, read_tensors(file)


def over(run: Run) -> bool:
    """Whether the last `train.patience` looks were not better than one before them; of all processes the same."""
    patience, ended = run.recipe.train.patience, False
    if not patience:
        return False
    if run.accelerator.is_main_process:
        first = best(run) or 0      # none, when no look was finite
        ended = sum(step > first for step in history(run.folder, criterion(run.recipe)[0])) >= patience
    return bool(most(run.accelerator, ended))
