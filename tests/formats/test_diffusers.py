import json

import pytest
import torch

from finetune import registry
from finetune.errors import FinetuneError
from finetune.formats import diffusers
from finetune.formats._configs import peft_configs

SPEC = registry.find("families", "sd1").SPEC
TO_K = "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k"
Q_PROJ = "text_model.encoder.layers.3.self_attn.q_proj"


def pair(module, rank=4, down="lora_A", up="lora_B"):
    return {f"{module}.{down}.weight": torch.randn(rank, 6), f"{module}.{up}.weight": torch.randn(8, rank)}


def decoded(tensors, **config):
    return diffusers.decode(tensors, {"lora_adapter_metadata": json.dumps(config)} if config else {}, SPEC)


def alpha_of(artifact):
    alphas = {t.item() for name, t in artifact.tensors.items() if name.endswith(".alpha")}
    assert len(alphas) == 1
    return alphas.pop()


def test_the_scale_comes_from_the_metadata():
    assert alpha_of(decoded(pair(f"unet.{TO_K}"))) == 4
    assert alpha_of(decoded(pair(f"unet.{TO_K}"), **{"unet.lora_alpha": 1})) == 1
    # The first that matches the end, from a dot on, or with ^ the whole path.
    for patterns in ({"attn2.to_k": 3}, {"n2.to_k": 2, f"^{TO_K}": 3, "to_k": 4}, {r"attn2\.to_k$": 3, ".*to_k": 4},
                     {"to_q|attn.*to_k": 3, "to_k": 4}, {"n2.*k": 2, "^to_k": 2, ".*attn2.*to_k": 3}):
        assert alpha_of(decoded(pair(f"unet.{TO_K}"), **{"unet.lora_alpha": 1, "unet.alpha_pattern": patterns})) == 3
    assert alpha_of(decoded(pair(f"unet.{TO_K}"), **{"unet.lora_alpha": 1, "unet.use_rslora": True})) == 2


def test_the_metadata_stay_out_of_the_artifact():
    assert decoded(pair(f"unet.{TO_K}"), **{"unet.lora_alpha": 1}).metadata == {}


@pytest.mark.parametrize("down, up", [
    ("lora_A", "lora_B"), ("lora.down", "lora.up"), ("lora_linear_layer.down", "lora_linear_layer.up"),
])
@pytest.mark.parametrize("path", [Q_PROJ, Q_PROJ.removeprefix("text_model.")])
def test_older_spellings_are_read(down, up, path):
    assert f"text.{Q_PROJ}.lora_A" in decoded(pair(f"text_encoder.{path}", 4, down, up)).tensors


@pytest.mark.parametrize("key", [f"unet.{TO_K}.lora_magnitude", "text_encoder_2.x.lora_A.weight", "y"])
def test_a_key_that_cannot_be_placed_is_named(key):
    with pytest.raises(FinetuneError, match=key):
        decoded(pair(f"unet.{TO_K}") | {key: torch.zeros(2, 2)})


def test_the_metadata_are_minimal_exact_and_for_every_component():
    unet = pair(f"unet.{TO_K}", 4) | pair("unet.conv_in", 2) | pair("unet.conv_out", 4)
    _, metadata = diffusers.encode(decoded(unet | pair(f"text_encoder.{Q_PROJ}", 4)), SPEC)
    config = json.loads(metadata["lora_adapter_metadata"])
    assert config["unet.target_modules"] == ["conv_in", "conv_out", TO_K]
    assert (config["unet.r"], config["unet.rank_pattern"]) == (4, {"conv_in": 2})
    # Without text_model., so that it fits transformers before and after 5.6.
    assert config["text_encoder.target_modules"] == [Q_PROJ.removeprefix("text_model.")]
    assert {key.split(".")[1] for key in config} == {
        "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern",
        "bias", "init_lora_weights", "lora_bias", "use_dora", "use_rslora",
    }


@pytest.mark.parametrize("text", [
    "[]", "{", "[" * 10**5, '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": 1%s}' % ("0" * 400),
    '{"unet.alpha_pattern": 3}', '{"unet.alpha_pattern": {"(": 1}}', '{"unet.alpha_pattern": {"%s": 1}}' % "|".join("a" * 17),
])
def test_senseless_metadata_are_told(text):
    with pytest.raises(FinetuneError, match="lora_adapter_metadata is not what diffusers writes"):
        diffusers.decode(pair(f"unet.{TO_K}"), {"lora_adapter_metadata": text}, SPEC)
    with pytest.raises(FinetuneError):
        peft_configs({"lora_adapter_metadata": text})
