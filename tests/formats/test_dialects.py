"""The same adapter in the words of every tool: all of them load to the same tensors. Where peft and diffusers write such
files themselves, theirs are taken."""

import json
import re
import time

import pytest
import torch
from safetensors.torch import save_file

from finetune import registry
from finetune.artifact import Artifact, modules, write_safetensors
from finetune.change import change
from finetune.cli import main
from finetune.commands.inspect import describe
from finetune.errors import FinetuneError
from finetune.formats import _dialects, base
from finetune.formats._configs import DIFFUSERS_METADATA, alphas_of, peft_configs
from finetune.formats._identify import identify

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
    "old diffusers": lambda part, path, role:
        DIFFUSERS[part] + path + {"lora_A": ".lora.down.weight", "lora_B": ".lora.up.weight"}[role],
    "mixed": lambda part, path, role: DIFFUSERS[part] + path + (
        PEFT if "attn" not in path else {"lora_A": ".lora.down.weight", "lora_B": ".lora.up.weight"})[role],
    "peft": lambda part, path, role: f"base_model.model.{path}{PEFT[role]}",
    "peft in memory": lambda part, path, role: f"base_model.model.{path}{PEFT[role].replace('.weight', '.default.weight')}",
    "bare": lambda part, path, role: path + PEFT[role],
}
DIALECTS = [(name, make, True) for name, make in WITH_ALPHA.items()] + [
    (name, lambda part, path, role, make=make: role != "alpha" and make(part, path, role), False)
    for name, make in WITHOUT.items()]


@pytest.mark.parametrize("make, alphas", [d[1:] for d in DIALECTS], ids=[d[0] for d in DIALECTS])
@pytest.mark.parametrize("target", ["kohya", "diffusers"])
def test_every_dialect_loads_and_converts_to_the_same_adapter(tmp_path, make, alphas, target):
    artifact = adapter(alpha=1.5 if alphas else 4.0)
    save_file(written(artifact, make), tmp_path / "x.safetensors")
    facts = identify(base.read_header(tmp_path / "x.safetensors"))
    assert facts["kind"] == "lora" and facts["modules"] == {"denoiser": len(UNET), "text": len(TEXT)}
    assert main(["convert", str(tmp_path / "x.safetensors"), "--to", target, "--out", str(tmp_path / "y.safetensors")]) == 0
    for file in "xy":
        found = base.load(tmp_path / f"{file}.safetensors", SPEC).tensors
        assert found.keys() == artifact.tensors.keys()
        assert all(torch.equal(found[name], t) for name, t in artifact.tensors.items())


XL = {      # diffusers → SGM, of SDXL: three levels, the upsampler of the first behind its attention
    f"{ATTENTION}.to_k": "input_blocks.4.1.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.9.ff.net.2": "middle_block.1.transformer_blocks.9.ff.net.2",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.2.resnets.2.conv_shortcut": "output_blocks.8.0.skip_connection",
    "add_embedding.linear_1": "label_emb.0.0",
}
JOINT = {   # diffusers → SD 3 as published, by OneTrainer's table, where q, k and v have numbers
    **{f"transformer_blocks.1.{ours}": f"joint_blocks.1.{theirs}" for ours, theirs in {
        "attn.to_q": "x_block.attn.qkv.0", "attn.to_k": "x_block.attn.qkv.1", "attn.to_v": "x_block.attn.qkv.2",
        "attn.to_out.0": "x_block.attn.proj", "attn.add_q_proj": "context_block.attn.qkv.0",
        "attn.add_k_proj": "context_block.attn.qkv.1",
        "attn.add_v_proj": "context_block.attn.qkv.2", "attn.to_add_out": "context_block.attn.proj",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2", "norm1.linear": "x_block.adaLN_modulation.1"}.items()},
    "norm_out.linear": "final_layer.adaLN_modulation.1", "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
}
T5 = ["encoder.block.3.layer.0.SelfAttention.q", "encoder.block.0.layer.1.DenseReluDense.wi_0"]
PATHS = {"sdxl": {"denoiser": list(XL), "text": TEXT, "text_2": TEXT},
         "sd3": {"denoiser": list(JOINT), "text": TEXT, "text_2": TEXT, "text_3": T5}}
TE = {"text": "lora_te1", "text_2": "lora_te2", "text_3": "lora_te3"}
OF_COMFY = {"text": "text_encoders.clip_l.transformer", "text_2": "text_encoders.clip_g.transformer",
            "text_3": "text_encoders.t5xxl.transformer"}
OF_OMI = {"text": "clip_l", "text_2": "clip_g", "text_3": "t5"}
OF_DIFFUSERS = {"text": "text_encoder", "text_2": "text_encoder_2", "text_3": "text_encoder_3"}
FOREIGN = [     # dialect, family, flat or dotted, prefixes, our names → theirs, roles
    ("diffusers", "sdxl", False, OF_DIFFUSERS | {"denoiser": "unet"}, {}, PEFT),
    ("sd-scripts, A1111", "sdxl", True, TE | {"denoiser": "lora_unet"}, XL, ROLES),
    ("OneTrainer, ai-toolkit", "sdxl", True, TE | {"denoiser": "lora_unet"}, {}, ROLES),
    ("OneTrainer OMI", "sdxl", False, OF_OMI | {"denoiser": "unet"}, XL, ROLES),
    ("ComfyUI", "sdxl", False, OF_COMFY | {"denoiser": "diffusion_model"}, XL, ROLES),
    ("SimpleTuner", "sd3", False, OF_DIFFUSERS | {"denoiser": "transformer"}, {}, PEFT),
    ("OneTrainer", "sd3", True, TE | {"denoiser": "lora_transformer"}, {}, ROLES),
    ("dotted", "sd3", False, TE | {"denoiser": "lora_transformer"}, {}, ROLES),
    ("OneTrainer OMI", "sd3", False, OF_OMI | {"denoiser": "transformer"}, JOINT, ROLES),
    ("SimpleTuner LyCORIS", "sd3", True, {"denoiser": "lycoris"}, {}, ROLES),
    ("peft", "sd3", False, {"denoiser": "base_model.model"}, {}, PEFT),
    ("sd-scripts", "sd3", True, TE | {"denoiser": "lora_unet"}, JOINT, ROLES),
    ("ai-toolkit, ComfyUI", "sd3", False, OF_COMFY | {"denoiser": "diffusion_model"}, JOINT, PEFT),
]


@pytest.mark.parametrize("family, is_flat, prefixes, names, roles", [row[1:] for row in FOREIGN],
                         ids=[f"{r[0]} {r[1]}" for r in FOREIGN])
def test_every_dialect_of_the_larger_families(tmp_path, family, is_flat, prefixes, names, roles):
    """Of SD 3 the file has q, k and v as one where its tool writes them so, and shift and scale of the last norm turned."""
    torch.manual_seed(0)
    tensors, theirs = {}, {}
    for part, path in ((part, path) for part in prefixes for path in PATHS[family].get(part, ())):
        rows = 12 if path == "norm_out.linear" else 8
        lora = {"lora_A": torch.randn(4, 6), "lora_B": torch.randn(rows, 4),
                "alpha": torch.tensor(2.0 if "alpha" in roles else 4.0)}
        tensors |= {f"{part}.{path}.{role}": t for role, t in lora.items()}
        if names.get(path) == "final_layer.adaLN_modulation.1":
            lora["lora_B"] = lora["lora_B"].roll(6, 0)
        theirs[part, names.get(path, path) if part == "denoiser" else path] = lora
    if "clip_l" not in prefixes.values():       # OneTrainer alone gives q, k and v numbers
        for stem in [stem for _, stem in theirs if stem.endswith(".qkv.0")]:
            three = [theirs.pop(("denoiser", f"{stem[:-1]}{i}")) for i in range(3)]
            theirs["denoiser", stem[:-2]] = {"lora_A": torch.cat([lora["lora_A"] for lora in three]),
                                             "alpha": 3 * three[0]["alpha"],
                                             "lora_B": torch.block_diag(*(lora["lora_B"] for lora in three))}
    dot = "_" if is_flat else "."
    file = {f"{prefixes[part]}{dot}{path.replace('.', dot)}{roles[role]}": t.contiguous()
            for (part, path), lora in theirs.items()
            for role, t in lora.items() if role in roles}
    save_file(file, tmp_path / "x.safetensors")
    spec = registry.find("families", family).SPEC
    for target in ("kohya", "diffusers"):
        out = tmp_path / f"{target}.safetensors"
        assert main(["convert", str(tmp_path / "x.safetensors"), "--family", family, "--to", target, "--out", str(out)]) == 0
        for path in (tmp_path / "x.safetensors", out):
            found = base.load(path, spec).tensors
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[name], t) for name, t in tensors.items())
    assert main(["verify", str(tmp_path / "x.safetensors"), "--family", family]) == 0


def test_sd3_is_known_by_its_width(tmp_path):
    save_file({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1, 1536)}, tmp_path / "x")
    assert identify(base.read_header(tmp_path / "x"))["family"] == "sd3"
    save_file({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1, 3072)}, tmp_path / "x")     # FLUX
    assert identify(base.read_header(tmp_path / "x"))["family"] is None


def test_the_first_attention_processors_of_diffusers(tmp_path):
    artifact = adapter(("denoiser",), only="attn2")
    names = {f"{ATTENTION}.to_k": "to_k", f"{ATTENTION}.to_out.0": "to_out"}
    for start in ("unet.", ""):
        save_file(written(artifact, lambda part, path, role: role != "alpha" and
                          f"{start}{ATTENTION}.processor.{names[path]}_lora.{'down' if role == 'lora_A' else 'up'}.weight"),
                          tmp_path / "x")
        assert base.load(tmp_path / "x", SPEC).tensors.keys() == artifact.tensors.keys()


def test_ldm_names_are_those_of_the_published_unet():
    for ours, theirs in LDM.items():
        assert _dialects.from_ldm(theirs) == ours == _dialects.from_ldm(ours)
        assert _dialects.dotted(theirs.replace(".", "_")) == theirs


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
    assert kind == "loha" or describe(tmp_path / "adapter_model.safetensors")["alphas"] == [2]
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
            peft_configs({DIFFUSERS_METADATA: config.replace("(a+)+$", pattern)})
    names, start = [f"{'a.' * 100}{i}" for i in range(500)], time.process_time()
    patterns = {"unet.alpha_pattern": dict.fromkeys(names, 2) | {f"a.*a{i}": 3 for i in range(16)}}
    alpha = alphas_of(peft_configs({DIFFUSERS_METADATA: json.dumps(patterns)})["unet"])
    assert {alpha(name, 4) for name in names} == {2}
    assert time.process_time() - start < 2
