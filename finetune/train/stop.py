"""Being asked to stop: SIGTERM and SIGINT, or a time that is over, end the run after the step it is in."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Stopped(Exception):
    """The end was asked for."""

    def __init__(self, number: int):
        self.number = number


def most(accelerator, number: int) -> int:
    """The greatest of what all processes say."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


class Stop:
    """Inside, signals are noted; a second one ends the process at once, which loses what a kill would. A `deadline`, in
    seconds of time.monotonic(), counts as SIGTERM."""

    def __init__(self, deadline: float = float("inf")):
        self._number, self._deadline = 0, deadline

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        self._number = number
        signal.signal(number, signal.SIG_DFL)

    @property
    def number(self) -> int:
        """The signal that this process got, or 0."""
        return self._number or (signal.SIGTERM if time.monotonic() > self._deadline else 0)

    def received(self, accelerator) -> int:
        """The signal that any process got, or 0: all processes stop after the same step."""
        return most(accelerator, self.number)

    @contextmanager
    def raised_by(self, module: nn.Module) -> Iterator[None]:
        """Inside, a call of the module raises Stopped once a signal is there: for what may be left undone."""
        def look(*_) -> None:
            if self.number:
                raise Stopped(self.number)

        hook = module.register_forward_pre_hook(look)
        try:
            yield
        finally:
            hook.remove()
