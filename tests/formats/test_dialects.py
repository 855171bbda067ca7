"""The same adapter in the words of every tool: all of them load to the same tensors. Where peft and diffusers write such
files themselves, theirs are taken."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from finetune import registry
from finetune.artifact import Artifact, modules, write_safetensors
from finetune.change import change
from finetune.cli import main
from finetune.errors import FinetuneError
from finetune.formats import _dialects, base

SPEC = registry.find("families", "sd1").SPEC
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
LDM = {      # diffusers → LDM, of SD 1.5: openaimodel.py counts the layers of all levels through
    f"{ATTENTION}.to_k": "input_blocks.4.1.transformer_blocks.0.attn2.to_k",
    f"{ATTENTION}.to_out.0": "input_blocks.4.1.transformer_blocks.0.attn2.to_out.0",
    "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
    "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj": "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
    "up_blocks.1.resnets.2.time_emb_proj": "output_blocks.5.0.emb_layers.1",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_2": "time_embed.2",
}
UNET = list(LDM)
TEXT = ["text_model.encoder.layers.2.self_attn.out_proj", "text_model.encoder.layers.0.mlp.fc1"]
ROLES = {"lora_A": ".lora_down.weight", "lora_B": ".lora_up.weight", "alpha": ".alpha"}
PEFT = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight"}


def adapter(parts=("denoiser", "text"), alpha=4.0, only=None):
    torch.manual_seed(0)
    tensors = {}
    for part, paths in (("denoiser", UNET), ("text", TEXT)):
        for path in paths if part in parts else ():
            conv = re.search("conv|samplers", path) and "time" not in path
            down, up = ((4, 6, 3, 3), (8, 4, 1, 1)) if conv else ((4, 6), (8, 4))
            if only is None or re.search(only, path):
                tensors |= {f"{part}.{path}.lora_A": torch.randn(down), f"{part}.{path}.lora_B": torch.randn(up),
                            f"{part}.{path}.alpha": torch.tensor(alpha)}
    return Artifact("lora", "sd1", tensors, {})


def written(artifact, name):
    """The tensors under the names that name(part, path, role) gives; None is left out."""
    found = {}
    for (part, path), module in modules(artifact.tensors).items():
        found |= {new: t for role, t in module.items() if (new := name(part, path, role))}
    return found


def flat(prefix, path):
    return f"{prefix}_{path.replace('.', '_')}"


def ldm(part, path):
    return LDM[path] if part == "denoiser" else path


KOHYA = {"denoiser": "lora_unet", "text": "lora_te"}
COMFY = {"denoiser": "diffusion_model.", "text": "text_encoders.clip_l.transformer."}
OMI = {"denoiser": "unet.", "text": "clip_l."}
DIFFUSERS = {"denoiser": "unet.", "text": "text_encoder."}
WITH_ALPHA = {
    "sd-scripts": lambda part, path, role: flat(KOHYA[part], path) + ROLES[role],
    "LDM blocks": lambda part, path, role: flat(KOHYA[part], ldm(part, path)) + ROLES[role],
    "te1, bare": lambda part, path, role: flat({"denoiser": "lora_unet", "text": "lora_te1"}[part],
                                               path.removeprefix("text_model.")) + ROLES[role],
    "LyCORIS": lambda part, path, role: flat("lycoris", path) + ROLES[role],
    "ComfyUI": lambda part, path, role: COMFY[part] + ldm(part, path) + ROLES[role],
    "OneTrainer": lambda part, path, role: OMI[part] + ldm(part, path) + ROLES[role],
    "ai-toolkit": lambda part, path, role: DIFFUSERS[part] + path + ROLES[role],
}
WITHOUT = {     # an alpha: it is the rank
    "diffusers": lambda part, path, role: DIFFUSERS[part] + path + PEFT[role],
    "diffusers, without text_model": lambda part, path, role: DIFFUSERS[part] + path.removeprefix("text_model.") + PEFT[role],
    "old diffusers": lambda part, path, role: DIFFUSERS[part] + path + {"lora_A": ".lora.down.weight", "lora_B": ".lora.up.weight"}[role],
    "mixed": lambda part, path, role: DIFFUSERS[part] + path + (
        PEFT if "attn" not in path else {"lora_A": ".lora.down.weight", "lora_B": ".lora.up.weight"})[role],
    "peft": lambda part, path, role: f"base_model.model.{path}{PEFT[role]}",
    "peft in memory": lambda part, path, role: f"base_model.model.{path}{PEFT[role].replace('.weight', '.default.weight')}",
    "bare": lambda part, path, role: path + PEFT[role],
}
DIALECTS = [(name, make, True) for name, make in WITH_ALPHA.items()] + [
    (name, lambda part, path, role, make=make: role != "alpha" and make(part, path, role), False) for name, make in WITHOUT.items()]


@pytest.mark.parametrize("make, alphas", [d[1:] for d in DIALECTS], ids=[d[0] for d in DIALECTS])
@pytest.mark.parametrize("target", ["kohya", "diffusers"])
def test_every_dialect_loads_and_converts_to_the_same_adapter(tmp_path, make, alphas, target):
    artifact = adapter(alpha=1.5 if alphas else 4.0)
    save_file(written(artifact, make), tmp_path / "x.safetensors")
    facts = base.identify(base.read_header(tmp_path / "x.safetensors"))
    assert facts["kind"] == "lora" and facts["modules"] == {"denoiser": len(UNET), "text": len(TEXT)}
    assert main(["convert", str(tmp_path / "x.safetensors"), "--to", target, "--out", str(tmp_path / "y.safetensors")]) == 0
    for file in "xy":
        found = base.load(tmp_path / f"{file}.safetensors", SPEC).tensors
        assert found.keys() == artifact.tensors.keys()
        assert all(torch.equal(found[name], t) for name, t in artifact.tensors.items())


def test_the_first_attention_processors_of_diffusers(tmp_path):
    artifact = adapter(("denoiser",), only="attn2")
    names = {f"{ATTENTION}.to_k": "to_k", f"{ATTENTION}.to_out.0": "to_out"}
    for start in ("unet.", ""):
        save_file(written(artifact, lambda part, path, role: role != "alpha" and
                          f"{start}{ATTENTION}.processor.{names[path]}_lora.{'down' if role == 'lora_A' else 'up'}.weight"), tmp_path / "x")
        assert base.load(tmp_path / "x", SPEC).tensors.keys() == artifact.tensors.keys()


def test_ldm_names_are_those_of_the_published_unet():
    for ours, theirs in LDM.items():
        assert _dialects.from_ldm(theirs, ".") == ours and _dialects.from_ldm(flat("", theirs)[1:], "_") == flat("", ours)[1:]
    assert _dialects.from_ldm("joint_blocks_0_x_block_attn_qkv", "_") is None


def test_an_oft_of_sd_scripts_with_its_constraint(tmp_path):
    """networks/oft.py, written out: the rotation is shorter than alpha times the rows."""
    torch.manual_seed(0)
    blocks, weight, alpha = torch.randn(2, 4, 4), torch.randn(8, 6), torch.tensor(1e-2)
    write_safetensors(tmp_path / "x", {"oft_unet_input_blocks_4_1_proj_in.oft_blocks": blocks,
                                       "oft_unet_input_blocks_4_1_proj_in.alpha": alpha}, {})
    artifact = base.load(tmp_path / "x", SPEC)
    q = blocks - blocks.mT
    q = q * ((q.flatten().norm().clamp(max=alpha * 8) + 1e-8) / (q.flatten().norm() + 1e-8))
    r = (torch.eye(4) + q) @ (torch.eye(4) - q).inverse()
    wanted = torch.einsum("knm,knp->kmp", r, weight.reshape(2, 4, 6)).reshape(8, 6) - weight
    found = change(modules(artifact.tensors)["denoiser", "down_blocks.1.attentions.0.proj_in"], weight)
    assert artifact.kind == "oft" and (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "loha"])
def test_what_peft_saves_in_its_own_folder(tmp_path, kind):
    """adapter_model.safetensors, with the scale in adapter_config.json beside it, against the weights that peft merges."""
    import copy

    from peft import LoHaConfig, LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"mid_block": torch.nn.ModuleDict({"to_q": torch.nn.Linear(6, 8)})})
    before = copy.deepcopy(model)
    settings = dict(r=4, target_modules=["mid_block.to_q"])
    config = LoHaConfig(alpha=2, **settings) if kind == "loha" else LoraConfig(
        lora_alpha=2, use_rslora=kind == "rslora", use_dora=kind == "dora", **settings)
    peft = get_peft_model(model, config)
    for name, p in peft.named_parameters():
        if any(word in name for word in ("lora_", "hada_")):
            p.data = torch.rand_like(p) + 0.1
    peft.save_pretrained(tmp_path)
    merged = peft.merge_and_unload()["mid_block"]["to_q"].weight
    (_, roles), = modules(base.load(tmp_path / "adapter_model.safetensors", SPEC).tensors).items()
    weight = before["mid_block"]["to_q"].weight
    assert (weight + change(roles, weight) - merged).norm() <= 1e-5 * merged.norm()
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(FinetuneError, match="its adapter_config.json cannot be read"):
        base.load(tmp_path / "adapter_model.safetensors", SPEC)


def test_what_diffusers_saves_for_kohya(tmp_path):
    """Its converter has the rank as alpha, and SDXL's name for the text encoder."""
    from diffusers.utils import convert_state_dict_to_kohya

    artifact = adapter(only="attn2|proj_in|self_attn", alpha=4.0)
    theirs = convert_state_dict_to_kohya(written(artifact, lambda part, path, role: role != "alpha" and
                                                 DIFFUSERS[part] + path + PEFT[role]))
    assert any(name.startswith("lora_te1_") for name in theirs)
    save_file(theirs, tmp_path / "x.safetensors")
    found = base.load(tmp_path / "x.safetensors", SPEC).tensors
    assert all(torch.equal(found[name], t) for name, t in artifact.tensors.items()) and found.keys() == artifact.tensors.keys()


def test_one_change_in_two_dialects_is_told(tmp_path):
    one = written(adapter(only="conv_in"), lambda part, path, role: flat("lora_unet", path) + ROLES[role])
    two = written(adapter(only="conv_in"), lambda part, path, role: flat("lora_unet", LDM[path]) + ROLES[role])
    save_file(one | two, tmp_path / "x")
    with pytest.raises(FinetuneError, match="and another key both mean"):
        base.load(tmp_path / "x", SPEC)


def test_a_pattern_of_the_metadata_cannot_take_for_ever():
    config = json.dumps({"unet.lora_alpha": 1, "unet.alpha_pattern": {"(a+)+$": 2}})
    for pattern in ("(a+)+$", "a*a*a*a*b"):
        with pytest.raises(FinetuneError, match="pattern"):
            base.peft_configs({base.DIFFUSERS_METADATA: config.replace("(a+)+$", pattern)})
