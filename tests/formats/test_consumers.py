"""The receipt of a file is what was measured in each tool with files of SD 1.5's size: ../shared/formats.md §1a, §1b."""

import re

import pytest
import torch

from finetune.formats._consumers import TOOLS, receipt
from finetune.header import Header

ATTENTION = "to_q", "to_k", "to_v", "to_out.0"
TEXT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
LDM = {"down_blocks": "input_blocks", "mid_block": "middle_block", "up_blocks": "output_blocks"}


def unet(family):
    """The module names of a published UNet, without its weights."""
    from diffusers import UNet2DConditionModel

    sizes = {"sd1": {"cross_attention_dim": 768}, "sd2": {"cross_attention_dim": 1024},
             "sdxl": {"block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
                      "transformer_layers_per_block": (1, 2, 10),
                      "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                      "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}}
    with torch.device("meta"):
        model = UNet2DConditionModel(**sizes[family])
    return [name for name, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]


@pytest.fixture(scope="module")
def names():
    """{family: (linear modules of the transformers, convolutions and the like, of the whole UNet the rest)}."""
    found = {}
    for family in ("sd1", "sdxl"):
        every = unet(family)
        linear = [name for name in every if "attentions" in name]
        conv = [name for name in every if re.search(r"resnets|samplers", name)]
        found[family] = linear, conv, [name for name in every if name not in {*linear, *conv}]
    found["sd2"] = found["sd1"]
    assert [len(found["sd1"][0]), len(found["sd1"][1]), len(found["sdxl"][0]), len(found["sdxl"][1])] == [192, 86, 722, 66]
    return found


def text(layers=12):
    return [f"text_model.encoder.layers.{i}.{name}" for i in range(layers) for name in TEXT]


def flat(prefix, paths):
    return [f"{prefix}_{path.replace('.', '_')}" for path in paths]


def header(modules, *roles, alpha=4.0, metadata=None, shape=(4, 8)):
    tensors = {f"{module}{role}": ("F32", shape) for module in modules for role in roles}
    alphas = {f"{module}.alpha": alpha for module in modules} if alpha is not None else {}
    return Header(tensors | {name: ("F32", ()) for name in alphas}, metadata or {}, alphas)


PAIR = ".lora_down.weight", ".lora_up.weight"
PEFT = ".lora_A.weight", ".lora_B.weight"


def counts(header, family="sd1"):
    """{tool: how many are right, or why none is} of the eight tools that were run."""
    found = {r.tool: r.right if r.right else "refused" if r.outcome == "refused" else r.outcome.split()[0]
             for r in receipt(header, family) if r.tool != "Draw Things"}
    assert list(found) == [tool for tool in TOOLS if tool != "Draw Things"]
    return list(found.values())


R, I, W = "refused", "ignored", "wrongly"


def both(names, family="sd1", te="lora_te"):
    return flat("lora_unet", names[family][0]) + flat(te, text())


@pytest.mark.parametrize("alpha", [4.0, None])
def test_what_we_write_is_read_by_all(names, alpha):
    assert counts(header(both(names), *PAIR, alpha=alpha)) == [264] * 8
    conv = flat("lora_unet", names["sd1"][0] + names["sd1"][1]) + flat("lora_te", text())
    assert counts(header(conv, *PAIR, alpha=alpha)) == [350] * 8
    assert {r.tool for r in receipt(header(conv, *PAIR), "sd1") if r.outcome == "loads fully"} == set(TOOLS)


def test_names_of_sd1(names):
    linear, conv, rest = names["sd1"]
    assert counts(header(both(names, te="lora_te1"), *PAIR)) == [264, 264, 264, 264, 192, 192, 192, 264]
    bare = flat("lora_unet", linear) + flat("lora_te", [path.removeprefix("text_model.") for path in text()])
    assert counts(header(bare, *PAIR)) == [264, 192, 192, R, 264, 192, 192, 192]
    ldm = [re.sub("|".join(LDM), lambda found: LDM[found[0]], name) for name in both(names)]
    assert counts(header(ldm, *PAIR)) == [R, 264, 264, 264, 264, 72, 72, 264]
    assert counts(header(flat("lora_unet", [n for n in linear if "attn1" in n]), *PAIR)) == [64, 64, 64, 64, 64, R, 64, 64]
    assert counts(header(flat("lora_unet", linear + rest), *PAIR)) == [196, 196, 196, 196, 196, 196, 192, 192]


def test_names_of_diffusers_and_peft(names):
    linear = names["sd1"][0]
    attention = [name for name in linear if name.endswith(ATTENTION)]
    others = [name for name in linear if name not in attention]
    old = [f"unet.{name.removesuffix('.0').replace('.to_', '.processor.to_')}_lora" for name in attention]
    dotted = [f"unet.{name}" for name in linear] + [f"text_encoder.{name}" for name in text()]
    lora = ".lora.down.weight", ".lora.up.weight"
    assert counts(header([f"unet.{n}" for n in attention], *lora, alpha=None)) == [128, I, I, R, I, R, I, 128]
    mixed = header([f"unet.{n}" for n in attention], *lora, alpha=None).tensors
    mixed |= header([f"unet.{n}" for n in others] + dotted[192:], *PEFT, alpha=None).tensors
    assert counts(Header(mixed, {}, {})) == [136, 136, I, R, I, R, I, 192]
    assert counts(header(dotted, *PEFT, alpha=None)) == [264, 136, I, R, I, R, I, 192]
    assert counts(header(old, ".down.weight", ".up.weight", alpha=None)) == [128, 128, I, 128, I, R, I, 128]
    assert counts(header([f"base_model.model.{n}" for n in linear], *PEFT, alpha=None)) == [I, I, I, R, I, R, I, I]
    assert counts(header(linear, *PEFT, alpha=None)) == [I, 64, I, R, I, R, I, 192]
    assert counts(header(both(names), *PAIR, metadata={"lora_adapter_metadata": "{}"})) == [R, *[264] * 7]


def test_kinds_of_change(names):
    linear = flat("lora_unet", names["sd1"][0])
    attention = [name for name in linear if re.search(r"_to_(q|k|v|out_0)$", name)]
    conv = [name for name in flat("lora_unet", names["sd1"][1]) if "proj" not in name]
    tucker = header(conv, *PAIR, ".lora_mid.weight").tensors
    probed = header(attention[:8], *PAIR, alpha=None).tensors
    assert counts(Header(tucker, {}, {}))[5] == R
    assert counts(Header(tucker | probed, {}, {})) == [R, *[len(conv) + 8] * 5, 8, 8]

    def dora(shape):
        magnitudes = {f"{name}.dora_scale": ("F32", shape) for name in attention}
        return Header(header(attention, *PAIR).tensors | magnitudes, {}, {})

    assert counts(dora((1, 8))) == [W, *[128] * 5, W, W]
    assert counts(dora((8, 1))) == [W, W, W, W, 128, W, W, W]
    assert counts(header(linear, *(f".hada_w{i}_{side}" for i in "12" for side in "ab"))) == [R, *[192] * 5, I, 192]
    assert counts(header(attention, ".lokr_w1", ".lokr_w2")) == [R, *[128] * 5, I, 128]
    assert counts(header(attention, ".lokr_w1", ".lokr_w2_a", ".lokr_w2_b")) == [R, *[128] * 4, R, I, 128]
    assert counts(header(attention, ".oft_blocks", alpha=0.0)) == [R, 128, 128, R, W, R, I, I]
    assert counts(header([f"oft{name[4:]}" for name in attention], ".oft_blocks", alpha=1e-3)) == [R, I, I, R, I, R, I, I]
    assert counts(header(linear[:172], ".diff", alpha=None)) == [R, *[172] * 5, I, 172]
    norms = [f"lora_unet_down_blocks_0_resnets_{i}_norm1" for i in range(20)]
    assert counts(header(norms, ".w_norm", ".b_norm", alpha=None)) == [R, 20, 20, 20, 20, R, I, I]


def test_different_alphas_are_one_for_diffusers(names):
    found = header(both(names), *PAIR)
    found.scalars[f"{both(names)[0]}.alpha"] = 8.0
    assert counts(found) == [263, *[264] * 7]


def test_invokeai_takes_resnets_alone_for_sdxl(names):
    for family, te, right in (("sd1", [], "refused"), ("sd1", flat("lora_te", text()), 158), ("sdxl", [], 66),
                              ("sd2", [], "refused")):
        assert counts(header(te + flat("lora_unet", names[family][1]), *PAIR), family)[5] == right
    deep = [name for name in names["sdxl"][0] if "attn1" in name]
    assert counts(header(flat("lora_unet", deep), *PAIR), "sdxl")[5] == len(deep)
    assert counts(header(flat("lora_te1", text()), *PAIR), "sdxl")[5] == R


def test_a_rank_of_one_is_none_for_stable_diffusion_cpp(names):
    assert counts(header(both(names), *PAIR, shape=(1, 8))) == [*[264] * 7, W]
    assert counts(header(both(names), *PAIR, shape=(1, 8), alpha=None)) == [264] * 8


def test_names_of_sd2_and_sdxl(names):
    linear, conv, _ = names["sdxl"]
    for own, total in ((linear, 986), (linear + conv, 1052)):
        te = flat("lora_te1", text()) + flat("lora_te2", text(32))
        plain = header(flat("lora_unet", own) + te, *PAIR)
        assert counts(plain, "sdxl") == [total] * 2 + [total - (total > 986)] + [total] * 5
        ldm = [re.sub("|".join(LDM), lambda found: LDM[found[0]], name) for name in flat("lora_unet", own)]
        assert counts(header(ldm + te, *PAIR), "sdxl") == [total] * 8
    dotted = [f"unet.{n}" for n in linear] + [f"text_encoder.{n}" for n in text()] + [f"text_encoder_2.{n}" for n in text(32)]
    assert counts(header(dotted, *PEFT, alpha=None), "sdxl") == [986, 426, I, R, I, R, I, 722]

    linear, conv, _ = names["sd2"]
    te = flat("lora_te", text(23))
    assert counts(header(flat("lora_unet", linear + conv) + te, *PAIR), "sd2") == [416] * 8
    ldm = [re.sub("|".join(LDM), lambda found: LDM[found[0]], name) for name in flat("lora_unet", linear)]
    assert counts(header(ldm + te, *PAIR), "sd2") == [138, 330, 330, 330, 330, 138, 138, 330]
    dotted = [f"unet.{n}" for n in linear] + [f"text_encoder.{n}" for n in text(23)]
    assert counts(header(dotted, *PEFT, alpha=None), "sd2") == [330, 202, I, R, I, R, I, 192]


def test_names_of_sd3():
    joint = [f"transformer_blocks.{i}.{name}" for i in range(24) for name in (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
        "ff.net.0.proj", "ff.net.2", *(("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2") if i < 23 else ()))]
    assert len(joint) == 285
    assert counts(header([f"transformer.{n}" for n in joint], *PEFT, alpha=None), "sd3") == [285, 285, 96, R, I, R, I, 285]
    assert counts(header([f"base_model.model.{n}" for n in joint], *PEFT, alpha=None), "sd3") == [I, 285, I, R, I, R, I, I]
    assert counts(header(flat("lora_transformer", joint), *PAIR), "sd3") == [I, 285, R, R, 285, R, I, I]
    fused = [f"lora_unet_joint_blocks_{i}_x_block_attn_qkv" for i in range(24)]
    assert counts(header(fused, *PAIR), "sd3") == [I, 24, R, 24, 24, R, 24, I]
    assert counts(header(fused, *PAIR, alpha=None), "sd3") == [I, 24, 24, 24, R, R, R, I]
    dotted = [f"diffusion_model.joint_blocks.{i}.x_block.attn.qkv" for i in range(24)]
    assert counts(header(dotted, *PEFT, alpha=None), "sd3") == [I, 24, I, 24, I, R, I, 24]


def outcomes(shapes):
    return {r.tool: r.outcome for r in receipt(Header({name: ("F32", s) for name, s in shapes.items()}, {}, {}), "sd1")}


def test_tokens_and_vaes():
    assert set(outcomes({"emb_params": (2, 768)}).values()) == {"loads fully"}
    assert outcomes({"ink": (2, 768)})["InvokeAI"] == "ignored" and outcomes({"ink": (768,)})["SD.Next"] == "wrongly 0/1"
    assert outcomes({"clip_l": (2, 768), "clip_g": (2, 1280)})["diffusers"] == "ignored"
    assert set(outcomes({"decoder.up.0.block.0.conv1.weight": (4, 4, 3, 3),
                         "quant_conv.bias": (4,)}).values()) == {"loads fully"}
    assert outcomes({"decoder.up_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3)})["A1111"] == "refused"
