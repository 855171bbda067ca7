"""Single files in the original naming: what goes out comes back bit for bit, and diffusers reads the same from it."""

import copy
import json

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import load_file, save_file

from finetune.artifact import published, read_header
from finetune.errors import FinetuneError
from finetune.families import _original, _single
from finetune.families._identify import LAYOUTS, Known, identify

FAMILIES = {"sd15": "sd1", "sd15-inpainting": "sd1", "sd21-base": "sd2", "sd21": "sd2", "sdxl": "sdxl",
            "sd3-medium": "sd3", "sd35-medium": "sd3", "sd35-large": "sd3"}
TINY = ["sd15", "sd15-inpainting", "sd21", "sdxl", "sd3-medium", "sd35-medium"]


def known(name: str) -> Known:
    return Known(FAMILIES[name], name, LAYOUTS[FAMILIES[name]])


def shrunk(name: str) -> dict[str, dict]:
    """The published configs with their blocks and layers as they are, and everything thin."""
    found = _single.configs(known(name))
    clip = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "projection_dim": 8, "vocab_size": 60,
            "bos_token_id": 58, "eos_token_id": 59, "pad_token_id": 59, "max_position_embeddings": 7}
    for component, config in found.items():
        if component == "unet":
            config |= {"block_out_channels": [8 * 2 ** min(i, 1) for i in range(len(config["block_out_channels"]))],
                       "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 12,
                       "projection_class_embeddings_input_dim": 20 if name == "sdxl" else None, "addition_time_embed_dim": 2}
        elif component == "transformer":
            heads = 2
            config |= {"num_attention_heads": heads, "attention_head_dim": 4, "caption_projection_dim": 4 * heads,
                       "joint_attention_dim": 12, "pooled_projection_dim": 10, "pos_embed_max_size": 6}
        elif component == "vae":
            config |= {"block_out_channels": [4, 8, 8, 8], "norm_num_groups": 2}
        elif component == "text_encoder_3":
            config |= {"d_model": 12, "d_ff": 8, "d_kv": 4, "num_heads": 2, "vocab_size": 50}
        elif component.startswith("text_encoder"):
            wider = {"hidden_size": 12, "projection_dim": 10} if component == "text_encoder_2" else {}
            config |= clip | wider
    return found


def parts(configs: dict) -> dict[str, torch.nn.Module]:
    """Random models of these configs."""
    torch.manual_seed(0)
    found = {}
    for component, pair in configs["model_index"].items():
        if component in configs and component not in ("scheduler", "tokenizer", "tokenizer_2"):
            cls = getattr({"diffusers": diffusers, "transformers": transformers}[pair[0]], pair[1])
            found[component] = cls.from_config(configs[component]) if pair[0] == "diffusers" else \
                cls(cls.config_class.from_dict(configs[component]))
            for p in found[component].parameters():
                torch.nn.init.normal_(p)        # a norm of ones would hide a swap
    if "transformer" in found:
        torch.nn.init.eye_(found["text_encoder"].text_projection.weight)
    return found


def ours(module) -> dict[str, torch.Tensor]:
    return {published(name): t for name, t in module.state_dict().items()}


def original(family: str, modules: dict) -> dict[str, torch.Tensor]:
    """All of a single file's tensors."""
    return {prefix + name: t.contiguous() for component, (kind, prefix) in LAYOUTS[family].items() if component in modules
            for name, t in _original.write(ours(modules[component]), _original.rows(kind, ours(modules[component])))}


@pytest.fixture(scope="module", params=TINY)
def member(request, tmp_path_factory):
    """(name, configs, modules, file) of a tiny member of a family."""
    configs = shrunk(request.param)
    modules = parts(configs)
    file = tmp_path_factory.mktemp(request.param) / "model.safetensors"
    save_file(original(FAMILIES[request.param], modules), file)
    return request.param, configs, modules, file


def same(found: dict, wanted: dict) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], t) for name, t in wanted.items())


def test_what_goes_out_comes_back_and_out_again_bit_for_bit(member):
    name, configs, modules, file = member
    found = identify(read_header(file))
    assert (found.family, found.places, found.notes) == (FAMILIES[name], LAYOUTS[FAMILIES[name]], ())
    assert found.name == {"sd21": "sd21-base"}.get(name, name)      # where the file does not say what it predicts
    source = _single.SingleFile(str(file), found, configs)
    again = {component: source.load(type(module), component, torch.float32) for component, module in modules.items()}
    for component, module in modules.items():
        assert same(again[component].state_dict(), module.state_dict()), component
        assert not any(p.requires_grad or p.is_meta for p in again[component].parameters()) and not again[component].training
        assert not any(b.is_meta for b in again[component].buffers())
    assert same(original(FAMILIES[name], again), load_file(file))
    assert source.load(type(modules["vae"]), "vae", torch.bfloat16).dtype == torch.bfloat16


def test_diffusers_reads_the_same(member):
    name, configs, modules, file = member
    for component, (kind, prefix) in LAYOUTS[FAMILIES[name]].items():
        tensors, module = load_file(file), modules[component]
        if kind == "unet":
            found = theirs.convert_ldm_unet_checkpoint(tensors, configs["unet"])
        elif kind == "mmdit":
            found = theirs.convert_sd3_transformer_checkpoint_to_diffusers(
                {key: t for key, t in tensors.items() if key.startswith(prefix)})
        elif kind == "vae":
            found = theirs.convert_ldm_vae_checkpoint(tensors, configs["vae"])
        elif kind == "open_clip":       # without a projection in the file it takes the width from the config
            found = theirs.convert_open_clip_checkpoint(module, tensors | (
                {prefix + "text_projection": torch.zeros(12, 10)} if component == "text_encoder_2" and False else {}), prefix)
        elif kind == "t5":
            found = theirs.convert_sd3_t5_checkpoint_to_diffusers(tensors)
        else:
            found = theirs.convert_ldm_clip_checkpoint(tensors, prefix)
            found = {key: t for key, t in found.items() if key in ours(module)} if kind == "clip" else found
        wanted = ours(module)
        if kind == "unprojected_clip":
            wanted.pop("text_projection.weight")        # diffusers makes the same identity when it loads the file
        if kind == "t5":
            wanted.pop("encoder.embed_tokens.weight")
        assert same(found, wanted), (component, kind, found.keys() ^ wanted.keys())
