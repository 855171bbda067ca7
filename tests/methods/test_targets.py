"""Which layers the words for targets name, at the real size of Stable Diffusion 1.5 (no weights are made)."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from finetune.errors import FinetuneError
from finetune.families.base import CLIP_TARGETS
from finetune.families.sd1 import SPEC
from finetune.methods import _targets
from finetune.methods._targets import Part


@pytest.fixture(scope="module")
def unet():
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)    # else as SD 1.x


@pytest.fixture(scope="module")
def text():
    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                            num_attention_heads=12))


def resolve(targets, module, groups=SPEC.targets):
    return _targets.resolve(targets, Part("sd1.denoiser", module, groups), "method.targets")


def test_it_is_the_real_unet(unet):
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


@pytest.mark.parametrize("targets, count", [
    (["cross_attention"], 64), (["attention"], 128), (["feed_forward"], 32), (["all"], 192), (["conv"], 86),
    (["all", "conv"], 278), (["attention", "feed_forward"], 160), (["attention", "cross_attention"], 128), (["to_k"], 32),
    (["attn2.to_k"], 16), (["mid_block.*.to_q"], 2), (["*"], 282),
])
def test_groups_and_patterns(unet, targets, count):
    assert len(resolve(targets, unet)) == count


@pytest.mark.parametrize("targets, count", [
    (["attention"], 48), (["feed_forward"], 24), (["all"], 72), (["q_proj"], 12), (["layers.11.*"], 6),
    (["text_model.encoder.layers.3.*"], 6)])
def test_groups_and_patterns_of_the_text_encoder(text, targets, count):
    """By the published name too, whatever transformers calls its modules."""
    assert len(resolve(targets, text, CLIP_TARGETS)) == count


@pytest.mark.parametrize("target, said", [
    ("to_kk", "nearest: 'to_k'"), ("cros_attention", "nearest: 'cross_attention'"),
    ("attn2", "none of them a Linear or Conv2d"),
    ("norm1", "none of them"), ("o_k", "matches no module of sd1.denoiser"),
])
def test_a_target_that_names_nothing_is_an_error_even_beside_one_that_does(unet, target, said):
    with pytest.raises(FinetuneError, match=said):
        resolve(["to_q", target], unet)


def override(words, unet, targets):
    return _targets.override(16, words, resolve(targets, unet), Part("sd1.denoiser", unet, SPEC.targets), "method.ranks")


def test_some_of_the_targets_have_another_number(unet):
    ranks = override({"cross_attention": 32, "*.attn1.to_v": 8, "conv": 4}, unet, ["attention", "conv"])
    assert [list(ranks.values()).count(rank) for rank in (32, 8, 4, 16)] == [64, 16, 86, 48]
    ranks = override({"to_k": 8, "attn2.to_k": 8}, unet, ["attention"])
    assert ranks["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"] == 8


@pytest.mark.parametrize("words, said", [
    ({"to_kk": 8}, "method.ranks: 'to_kk' matches no module"),
    ({"conv": 8}, "method.ranks: 'conv' names none of the 64 targets"),
    ({"to_k": 8, "*.attn2.*": 32}, r"'to_k' and '\*.attn2.\*' both name down_blocks.* with 8 and 32"),
])
def test_a_word_that_names_none_of_the_targets_or_what_another_names_is_an_error(unet, words, said):
    with pytest.raises(FinetuneError, match=said):
        override(words, unet, ["cross_attention"])
