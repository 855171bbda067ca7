"""Gradient release: each parameter is stepped within the backward pass, and lets go of its gradient (LOMO, Lv et al. 2023)."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def released(parameters: Iterable[nn.Parameter], step: Callable[[Tensor], None]) -> Iterator[list[Tensor]]:
    """Inside a backward, no two parameters have a gradient at once: as soon as one has, `step` is called with its norm, which
    an optimizer takes for a step of that parameter alone. Gives the list of the norms."""
    norms: list[Tensor] = []

    def let_go(p: nn.Parameter) -> None:
        norms.append(p.grad.norm())
        step(norms[-1])
        p.grad = None

    hooks = [p.register_post_accumulate_grad_hook(let_go) for p in parameters]
    try:
        yield norms
    finally:
        for hook in hooks:
            hook.remove()
