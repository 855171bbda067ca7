"""How alike two pictures are: (B, 3, H, W) in [-1, 1]."""

import importlib

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from finetune.errors import FinetuneError

WINDOW, SIGMA = 11, 1.5


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """(B,) in dB; what lies outside of the range is cut, as in a file."""
    error = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp_min(1e-12))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """(B,) mean structural similarity (Wang et al. 2004, eq. 13): their Gaussian window and constants, on each colour."""
    x = torch.arange(WINDOW, device=a.device, dtype=a.dtype) - WINDOW // 2
    line = torch.softmax(-x.square() / (2 * SIGMA ** 2), 0)
    window = (line[:, None] * line)[None, None]

    def blurred(t: Tensor) -> Tensor:
        return conv2d(t.flatten(0, 1)[:, None], window).reshape(*t.shape[:2], -1)

    ma, mb = blurred(a), blurred(b)
    va, vb, cov = blurred(a * a) - ma ** 2, blurred(b * b) - mb ** 2, blurred(a * b) - ma * mb
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2       # of a range of 2
    return ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma ** 2 + mb ** 2 + c1) * (va + vb + c2))).mean(dim=(1, 2))


def gradient(error: Tensor) -> Tensor:
    """(B,) the mean size of the error's difference between neighbours, down and across."""
    return sum(error.diff(dim=axis).abs().mean(dim=(1, 2, 3)) for axis in (2, 3))


def lpips() -> nn.Module:
    """LPIPS (Zhang et al. 2018) on VGG, frozen: (a, b) → (B, 1, 1, 1). FinetuneError without the package or its network."""
    try:
        network = importlib.import_module("lpips").LPIPS(net="vgg", verbose=False)
    except (ImportError, RuntimeError) as e:        # the latter of a torchvision that was built for another torch
        raise FinetuneError(f"objective.lpips: the package lpips cannot be loaded: {e}\n    pip install 'finetune[lpips]', "
                            f"and a torchvision that is built for torch {torch.__version__}; or leave it out") from None
    except OSError as e:        # torchvision fetches the VGG
        raise FinetuneError(f"objective.lpips: its network cannot be fetched: {e}; leave it out, or start once "
                            "online") from None
    return network.requires_grad_(False).eval()
