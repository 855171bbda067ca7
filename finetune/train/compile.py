"""torch.compile of the denoiser's blocks: `train.compile`."""

import os
from pathlib import Path

import torch
from torch import nn

from finetune.errors import FinetuneError

SHAPES = 256        # kinds of blocks times buckets that may be compiled; torch gives up, without a word, after 8


def compile_blocks(denoiser: nn.Module, device: torch.device, kept: Path) -> None:
    """Have the blocks that make up the denoiser compiled when a step first runs them; what samples, validates and proves runs
    them as they are (see loop.py). Compiled code is kept in the folder. Raises FinetuneError where nothing can be compiled."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept))
    torch._dynamo.config.recompile_limit = SHAPES
    try:
        torch.compile(lambda x: x.sin().cos())(torch.ones(8, device=device))
    except Exception as e:      # torch has no common class for a compiler that is missing, old or broken
        raise FinetuneError(f"train.compile: torch cannot compile here: {str(e).strip().splitlines()[0]}\n    "
                            "it needs a C++ compiler, and Triton on a GPU; leave it out, or install them") from None
    for block in denoiser.modules():
        if type(block).__name__ in {*denoiser._repeated_blocks, "ResnetBlock2D"}:
            block.compile(dynamic=False)
    torch.compiler.set_stance("force_eager")
