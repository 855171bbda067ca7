"""The best step of a run, and how long ago it was: by the loss on held-out pictures, or by a metric of the previews."""

from collections.abc import Mapping

from finetune import registry
from finetune.artifact import write_safetensors
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


def best(run: Run) -> int | None:
    """The first of the best steps. The base itself is no candidate."""
    key, sign = criterion(run.recipe)
    found = {step: sign * value for step, value in history(run.folder, key).items() if step}
    return min(found, key=found.get) if found else None


def note(run: Run, done: int, line: Mapping[str, object]) -> None:
    """Append what was measured to metrics.jsonl, and keep the parameters if they are the best so far."""
    write(run, {"step": done} | line)
    if run.recipe.train.keep_best and criterion(run.recipe)[0] in line and best(run) == done:
        found = {name: p.detach().cpu() for name, p in run.method.parameters().items()}
        write_safetensors(run.folder.best, found, {"step": str(done)})


def over(run: Run) -> bool:
    """Whether the last `train.patience` looks were not better than one before them; of all processes the same."""
    patience, ended = run.recipe.train.patience, False
    if not patience:
        return False
    if run.accelerator.is_main_process:
        steps = history(run.folder, criterion(run.recipe)[0])
        ended = (first := best(run)) is not None and sum(step > first for step in steps) >= patience
    return bool(most(run.accelerator, ended))
