"""Which layers the words for targets name, at the real size of Stable Diffusion 1.5 (no weights are made)."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from finetune.errors import FinetuneError
from finetune.families.sd1 import SPEC
from finetune.methods.lora import resolve


@pytest.fixture(scope="module")
def unet():
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)     # diffusers' defaults are SD 1.x


def test_it_is_the_real_unet(unet):
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


@pytest.mark.parametrize("targets, count", [
    (["cross_attention"], 64), (["attention"], 128), (["feed_forward"], 32), (["all"], 192),
    (["attention", "feed_forward"], 160), (["attention", "cross_attention"], 128), (["to_k"], 32), (["attn2.to_k"], 16),
    (["mid_block.*.to_q"], 2), (["*"], 282),
])
def test_groups_and_patterns(unet, targets, count):
    assert len(resolve(targets, unet, SPEC)) == count


@pytest.mark.parametrize("target, said", [
    ("to_kk", "nearest: 'to_k'"), ("cros_attention", "nearest: 'cross_attention'"), ("attn2", "none of them a Linear or Conv2d"),
    ("norm1", "none of them"), ("o_k", "matches no module"),
])
def test_a_target_that_names_nothing_is_an_error_even_beside_one_that_does(unet, target, said):
    with pytest.raises(FinetuneError, match=said):
        resolve(["to_q", target], unet, SPEC)
