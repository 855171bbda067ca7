"""What the files of a run folder hold, so that one which was edited, cut or mixed up is told as it is read."""

import json

from typing_extensions import TypedDict     # pydantic wants this one

EXTRA = {"extra": "allow"}      # what more is there is kept, unchecked
NUMBER = int, float
# Of a line of metrics.jsonl, what may not be null, or is no number.
KINDS = {"step": int, "images_per_second": NUMBER, "memory_mb": NUMBER, "skipped": list, "why": str, "alarm": str,
         "validation_levels": list}


class Steps(TypedDict):
    __pydantic_config__ = EXTRA
    max_steps: int
    batch_size: int
    gradient_accumulation: int


class Trained(TypedDict):
    __pydantic_config__ = EXTRA
    train: Steps


class Exact(TypedDict):
    recipe: Trained             # its training part
    data: str
    base: dict[str, str]        # part -> hash of its weights
    processes: int
    device: str


class Identity(TypedDict):
    """run.json: what has to be the same for a run to be continued, and what may change its last digits."""

    exact: Exact
    rounding: dict[str, str | int]


class Owner(TypedDict):
    """Who holds a run folder, or held it last."""

    pid: int
    host: str
    started: str
    words: list[str]            # of the command line that continues its run
    working_folder: str


def measured(line: bytes) -> dict:
    """A line of metrics.jsonl: its step, and numbers by name. Raises ValueError for what no run has written."""
    try:
        found = json.loads(line)
        for key, value in found.items():
            if not isinstance(value, KINDS.get(key, (*NUMBER, type(None)))):
                raise ValueError(f"{key} is {type(value).__name__}")
            if isinstance(value, int):
                float(value)        # one of hundreds of digits is none
        for key in ("step", *(("images_per_second", "memory_mb") if "loss" in found else ())):
            if key not in found:
                raise ValueError(f"a line has no {key}")
    except (AttributeError, OverflowError, RecursionError) as e:
        raise ValueError(str(e)) from None
    return found
