"""Changes of a weight as products of two thin matrices: the nearest to a matrix, fewer ranks, sums and norms.

The one truncation of singular values in this code: what is kept is the nearest product of its rank (Eckart & Young 1936).

Shapes: O I rows and columns of a weight, the kernel of a convolution within I · R rank.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finetune.change import Roles
from finetune.errors import FinetuneError

FIRST = 16      # ranks that are looked at before it is known how many an energy needs


@dataclass(frozen=True)
class Cut:
    """How many ranks are kept: this number, or the fewest that hold this share of the sum of squares."""

    rank: int | None = None
    energy: float = 1.0

    def kept(self, s: Tensor, squares: float) -> int:
        found = self.rank or 1 + int((s.double().square().cumsum(0) < self.energy * squares).sum())
        return min(found, len(s))


@dataclass(frozen=True)
class LowRank:
    """A product near a change, and how near, by Frobenius norms."""

    up_OR: Tensor
    down_RI: Tensor
    inner: tuple[int, ...]      # of the weight, its shape without O
    norm: float                 # of the change
    rest: float                 # of change − product

    @property
    def rank(self) -> int:
        return len(self.down_RI)

    @property
    def error(self) -> float:
        return self.rest / self.norm if self.norm else 0.0


def factors(module: Roles) -> tuple[Tensor, Tensor]:
    """(up, down) of a LoRA module in float64, with alpha/r in the first."""
    down = module["lora_A"].double().flatten(1)
    return module["lora_B"].double().flatten(1) * (module["alpha"].double() / len(down)), down


def norm(up_OR: Tensor, down_RI: Tensor) -> float:
    """‖up·down‖ without the product: its square is the sum over (upᵀup) ∘ (down·downᵀ)."""
    up, down = up_OR.double(), down_RI.double()
    return ((up.mT @ up) * (down @ down.mT)).sum().clamp_min(0).sqrt().item()


def total(modules: Iterable[tuple[Roles, float]]) -> LowRank:
    """The sum of LoRA modules times their strengths, exactly: their ranks stand one behind the other."""
    modules = list(modules)
    pairs = [(strength * up, down) for (up, down), strength in ((factors(module), s) for module, s in modules)]
    up, down = torch.cat([up for up, _ in pairs], 1), torch.cat([down for _, down in pairs])
    return LowRank(up, down, tuple(modules[0][0]["lora_A"].shape[1:]), norm(up, down), 0.0)


def nearest(change: Tensor, cut: Cut) -> LowRank:
    """The nearest product of that many ranks to a change, (O, I[, K, K])."""
    matrix = change.float().flatten(1)
    squares, rank = matrix.double().square().sum().item(), cut.rank or FIRST
    while True:
        u, s, v = leading(matrix, rank)
        if cut.rank or len(s) == min(matrix.shape) or s.double().square().sum().item() >= cut.energy * squares:
            break
        rank *= 2
    up, down = _halves(u, s, v, cut.kept(s, squares))
    rest = torch.linalg.vector_norm(matrix - up @ down, dtype=torch.float64).item()
    return LowRank(up, down, tuple(change.shape[1:]), math.sqrt(squares), rest)


def leading(matrix_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(u, s, vᵀ): the first `rank` singular values and vectors, or all of a matrix that is not much larger.

    Of a large one by subspace iteration (Halko et al. 2011, algorithm 4.4), always from the same start: at 1280 x 1280 and
    rank 16, 14 times as fast as the whole, and what it leaves is larger by less than 0.1 % even for a matrix of noise."""
    if 4 * rank >= min(matrix_OI.shape):
        return torch.linalg.svd(matrix_OI, full_matrices=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix_OI, q=2 * rank, niter=8)
    return u[:, :rank], s[:rank], v[:, :rank].mT


def shrunk(product: LowRank, cut: Cut) -> LowRank:
    """The same with fewer ranks; only its two sides are decomposed, and the R x R matrix between them."""
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(product.up_OR), torch.linalg.qr(product.down_RI.mT)
    u, s, v = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    kept = cut.kept(s, s.square().sum().item())
    up, down = _halves(q_up @ u, s, v @ q_down.mT, kept)
    return replace(product, up_OR=up, down_RI=down, rest=s[kept:].square().sum().sqrt().item())


def _halves(u: Tensor, s: Tensor, v: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    root = s[:kept].sqrt()
    return u[:, :kept] * root, root[:, None] * v[:kept]


def differences(pairs: Iterable[tuple[str, Tensor, Tensor]], layer: Callable[[str], bool],
                cut: Cut) -> tuple[dict[str, LowRank], float]:
    """Of (name of a tensor, before, after): {module: its change in fewer ranks} for the layers that changed, and the sum of
    squares of all other change, of biases and norms: what no LoRA can hold."""
    found, other = {}, 0.0
    for name, before, after in pairs:
        stem, _, role = name.rpartition(".")
        if torch.equal(before.to(after.dtype), after):      # a copy in a coarser format has not been trained
            continue
        change = after.float() - before.float()
        if not change.isfinite().all():
            raise FinetuneError(f"{name}: its change is not finite; one of the two models is damaged")
        if role == "weight" and change.ndim > 1 and layer(stem):
            found[stem] = nearest(change, cut)
        else:
            other += change.double().square().sum().item()
    return found, other


def packed(found: Mapping[str, LowRank], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, LowRank]]:
    """The canonical tensors of a LoRA, with the largest rank as every module's alpha, and the products as they are written:
    rounding counts as error. Raises FinetuneError for no product at all and for what the dtype cannot hold."""
    if not found:
        raise FinetuneError("no layer has changed: there is nothing that a LoRA could hold")
    alpha = torch.tensor(float(max(product.rank for product in found.values())))
    tensors, written = {}, {}
    for stem, product in found.items():
        rank = product.rank
        up = (product.up_OR * (rank / alpha)).to(dtype).reshape(-1, rank, *[1] * (len(product.inner) - 1))
        down = product.down_RI.to(dtype).reshape(rank, *product.inner)
        if not (up.isfinite().all() and down.isfinite().all()):
            raise FinetuneError(f"{stem} is not finite in {dtype}; use --dtype float32".replace("torch.", ""))
        module = {"lora_A": down.contiguous(), "lora_B": up.contiguous(), "alpha": alpha.clone()}
        tensors |= {f"{stem}.{role}": tensor for role, tensor in module.items()}
        new_up, new_down = factors(module)
        rounding = norm(torch.cat([new_up, -product.up_OR.double()], 1), torch.cat([new_down, product.down_RI.double()]))
        # What is cut off is orthogonal to what is kept, and so to the first order of its rounding.
        written[stem] = replace(product, rest=math.hypot(product.rest, rounding))
    return tensors, written


def error(found: Iterable[LowRank], other: float = 0.0) -> float:
    """‖all change − all products‖ / ‖all change‖, with this sum of squares that is in no product."""
    found = list(found)
    whole = sum(product.norm ** 2 for product in found) + other
    return math.sqrt((sum(product.rest ** 2 for product in found) + other) / whole) if whole else 0.0
