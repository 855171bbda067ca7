"""What metrics.jsonl and the previews say, also to trackers that Accelerate knows by name, such as TensorBoard and W&B."""

from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from PIL import Image

from finetune.errors import FinetuneError

SHOW = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}, "swanlab": {}}      # that take pictures in the same words


def check(names: tuple[str, ...]) -> None:
    """Raise FinetuneError for one that is not installed: Accelerate would leave it out in silence."""
    there = [str(name) for name in get_available_trackers()]
    if missing := [name for name in names if name not in there]:
        raise FinetuneError(f"train.trackers: {', '.join(missing)}: Accelerate knows no such tracker, or its package is not "
                            f"installed; there is {', '.join(there) or 'none'}")


def start(accelerator: Accelerator, folder: Path) -> None:
    accelerator.init_trackers("finetune", init_kwargs={"wandb": {"name": folder.resolve().name, "dir": str(folder)}})


def log(accelerator: Accelerator, line: dict) -> None:
    """The numbers of a line of metrics.jsonl."""
    if numbers := {key: value for key, value in line.items() if isinstance(value, (int, float)) and key != "step"}:
        accelerator.log(numbers, step=line["step"])


def show(accelerator: Accelerator, sheet: Image.Image, step: int) -> None:
    for tracker in accelerator.trackers:
        if tracker.name in SHOW:
            tracker.log_images({"preview": np.asarray(sheet.convert("RGB"))[None]}, step=step, **SHOW[tracker.name])
