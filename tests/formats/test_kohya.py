import re
import time

import pytest
import torch

from finetune import registry
from finetune.artifact import Artifact, write_safetensors
from finetune.errors import FinetuneError
from finetune.formats import base, kohya
from finetune.formats._identify import identify
from finetune.formats._dialects import dotted
from finetune.header import Header

SPEC = registry.find("families", "sd1").SPEC
TO_K = "down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k"
Q_PROJ = "encoder_layers_3_self_attn_q_proj"


def pair(module, rank=4, alpha=None):
    down, up = torch.randn(rank, 6), torch.randn(8, rank)
    tensors = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    return tensors if alpha is None else tensors | {f"{module}.alpha": torch.tensor(float(alpha))}


def decoded(tensors, metadata=None):
    return kohya.decode(tensors, metadata or {}, SPEC)


@pytest.mark.parametrize("path", [
    "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.3.attentions.2.proj_in",
    "up_blocks.1.resnets.0.time_emb_proj",
    "down_blocks.1.resnets.0.conv_shortcut",
    "down_blocks.2.downsamplers.0.conv",
    "up_blocks.0.resnets.11.conv2",
    "time_embedding.linear_1",
    "conv_in",
    "text_model.encoder.layers.11.self_attn.out_proj",
    "text_model.encoder.layers.0.mlp.fc1",
    "text_projection",
])
def test_underscores_become_dots_again(path):
    assert dotted(path.replace(".", "_")) == path


@pytest.mark.parametrize("flat", ["", "input_blocks_4_1_proj_inn", 28 * "norm_out_", "mid_block__0", "conv_in_", "to_kk"])
def test_an_unknown_name_has_no_dots(flat):
    assert dotted(flat) is None


@pytest.mark.parametrize("prefix", ["lora_te_text_model_", "lora_te1_text_model_", "lora_te_", "lora_te1_"])
def test_every_spelling_of_the_text_encoder(prefix):
    stem = "text.text_model.encoder.layers.3.self_attn.q_proj"
    assert set(decoded(pair(f"{prefix}{Q_PROJ}")).tensors) == {f"{stem}.{role}" for role in ("lora_A", "lora_B", "alpha")}


def test_no_alpha_means_scale_one():
    tensors = decoded(pair(f"lora_unet_{TO_K}", rank=4)).tensors
    assert next(t for name, t in tensors.items() if name.endswith("alpha")) == 4


def test_mixed_alphas_are_folded():
    file = pair(f"lora_unet_{TO_K}", alpha=4) | pair("lora_unet_conv_out", alpha=4)
    file |= pair("lora_unet_conv_in", alpha=1)
    tensors = decoded(file).tensors
    assert {t.item() for name, t in tensors.items() if name.endswith("alpha")} == {4.0}
    assert torch.equal(tensors["denoiser.conv_in.lora_B"], file["lora_unet_conv_in.lora_up.weight"] / 4)


@pytest.mark.parametrize("key", [
    f"lora_unet_{TO_K}.lora_B.bias", f"lora_unet_{TO_K}.rescale", f"lora_te2_{Q_PROJ}.alpha",
    "lora_unet_input_blocks_4_1_proj_inn.alpha", "something.else",
])
def test_a_key_that_cannot_be_placed_is_named(key):
    with pytest.raises(FinetuneError, match=re.escape(key)):
        decoded(pair(f"lora_unet_{TO_K}", alpha=1) | {key: torch.tensor(1.0)})


def test_many_such_keys_are_counted():
    with pytest.raises(FinetuneError, match="and 2 more"):
        decoded({f"x.{i}": torch.zeros(1) for i in range(5)})


@pytest.mark.parametrize("half, name", [("lora_down", "down"), ("lora_up", "up")])
def test_a_missing_half_is_told(half, name):
    file = pair(f"lora_unet_{TO_K}", alpha=1)
    del file[f"lora_unet_{TO_K}.{half}.weight"]
    with pytest.raises(FinetuneError, match=rf"attn2.to_k lacks its {name}"):
        decoded(file)


def test_halves_of_different_rank_are_told():
    file = pair("lora_unet_conv_in") | {"lora_unet_conv_in.lora_up.weight": torch.zeros(8, 5)}
    with pytest.raises(FinetuneError, match=r"\(4, 6\) and \(8, 5\) do not fit"):
        decoded(file)


def test_an_alpha_of_several_numbers_is_told():
    with pytest.raises(FinetuneError, match=r"conv_in.alpha is not one number but \(2,\)"):
        decoded(pair("lora_unet_conv_in") | {"lora_unet_conv_in.alpha": torch.ones(2)})


def test_two_spellings_of_one_module_are_told():
    with pytest.raises(FinetuneError, match="another key both mean"):
        decoded(pair(f"lora_te_{Q_PROJ}") | pair(f"lora_te1_{Q_PROJ}"))


def test_what_consumers_read_is_there():
    artifact = decoded(pair(f"lora_unet_{TO_K}", rank=4, alpha=2), {"ss_output_name": "ink"})
    artifact.metadata["lora_adapter_metadata"] = "{}"  # diffusers refuses it next to alphas
    tensors, metadata = kohya.encode(artifact, SPEC)
    assert tensors[f"lora_unet_{TO_K}.alpha"].shape == ()
    assert metadata == {
        "finetune.family": "sd1",
        "finetune.kind": "lora",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": "ink",
        "ss_base_model_version": "sd_v1",
        "ss_network_alpha": "2",
        "ss_network_dim": "4",
        "ss_network_module": "networks.lora",
        "ss_output_name": "ink",
        "ss_v2": "False",
    }


def test_a_path_that_would_not_come_back_is_told():
    tensors = {"denoiser.odd_name.lora_A": torch.zeros(1, 2), "denoiser.odd_name.lora_B": torch.zeros(2, 1),
               "denoiser.odd_name.alpha": torch.tensor(1.0)}
    with pytest.raises(FinetuneError, match="denoiser.odd_name: is no layer that has a name"):
        kohya.encode(Artifact("lora", "sd1", tensors, {}), SPEC)


def test_identify_by_width_and_by_metadata():
    def header(width, **metadata):
        module = f"lora_unet_{TO_K}"
        return Header({f"{module}.lora_down.weight": ("F16", (4, width))}, metadata, {f"{module}.alpha": 2.0})

    assert identify(header(768)) == {
        "kind": "lora", "format": "kohya", "family": "sd1",
        "ranks": [4], "alphas": [2], "modules": {"denoiser": 1},
    }
    assert identify(header(2048))["family"] == "sdxl"
    assert identify(header(64))["family"] is None
    assert identify(header(64, ss_base_model_version="sd_v2_768_v"))["family"] == "sd2"
    assert identify(header(1024, **{"finetune.family": "sd1"}))["family"] == "sd1"


def test_many_long_names_take_no_time():
    header = Header({f"lora_unet_{'a_' * 100}{i}.alpha": ("F32", ()) for i in range(6000)}, {}, {})
    start = time.process_time()
    assert identify(header)["kind"] is None and time.process_time() - start < 2


@pytest.mark.parametrize("name, kind", [
    ("lora_unet_x.hada_w1_a", "loha"), ("lora_unet_x.lokr_w2", "lokr"), ("lora_unet_x.dora_scale", "dora"),
    ("emb_params", "embedding"), ("model.diffusion_model.out.2.weight", "checkpoint"),
    ("encoder.down.0.block.0.conv1.weight", "vae"), ("decoder.up_blocks.0.resnets.0.conv1.bias", "vae"),
    ("down_blocks.0.resnets.0.conv1.weight", "unet"),
    ("encoder.layers.0.self_attn.k_proj.bias", "text encoder"),
    ("anything", None),
])
def test_identify_what_is_no_lora(name, kind):
    facts = identify(Header({name: ("F32", (4, 4)), "and.more": ("F32", (4, 4))}, {}, {}))
    assert facts["kind"] == kind and facts["format"] in (None, "kohya", "diffusers", "single_file", "peft", "transformers")


def test_load_tells_an_adapter_of_another_family(tmp_path):
    path = tmp_path / "x.safetensors"
    artifact = decoded(pair(f"lora_unet_{TO_K}"))
    base.save(Artifact("lora", "sdxl", artifact.tensors, {}), path, "diffusers", SPEC)
    with pytest.raises(FinetuneError, match="x.safetensors: is for sdxl, and the base is sd1"):
        base.load(path, SPEC)


def test_load_tells_a_file_that_no_format_reads(tmp_path):
    write_safetensors(tmp_path / "x", {"base_model.model.x.oft_R.weight": torch.zeros(2, 3)}, {})
    with pytest.raises(FinetuneError, match="no format reads it: kind oft"):
        base.load(tmp_path / "x", SPEC)
