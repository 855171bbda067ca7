"""LoRAs of SD 3 under its original names, where q, k and v are one layer."""

import pytest
import torch
from diffusers import SD3Transformer2DModel

from finetune import registry
from finetune.artifact import Artifact, modules
from finetune.change import core
from finetune.errors import FinetuneError
from finetune.families import _original
from finetune.formats import _joint, base, kohya
from finetune.formats._identify import identify

SPEC = registry.find("families", "sd3").SPEC
WIDTH = 12


@pytest.fixture(scope="module")
def layers() -> dict[str, tuple[int, int]]:
    """Every linear layer of an MM-DiT with both kinds of attention -> its shape."""
    model = SD3Transformer2DModel(sample_size=8, num_layers=3, attention_head_dim=6, num_attention_heads=2,
                                  joint_attention_dim=10, caption_projection_dim=WIDTH, pooled_projection_dim=8,
                                  pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm")
    return {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def adapter(layers, alpha=1.7, dtype=torch.float32, rank=2, kind="lora"):
    torch.manual_seed(0)
    tensors = {}
    for path, (rows, columns) in layers.items():
        if kind == "difference":
            tensors[f"denoiser.{path}.diff"] = torch.randn(rows, columns)
            continue
        tensors |= {f"denoiser.{path}.lora_A": torch.randn(rank, columns).to(dtype),
                    f"denoiser.{path}.lora_B": torch.randn(rows, rank).to(dtype),
                    f"denoiser.{path}.alpha": torch.tensor(alpha)}
    return Artifact(kind, "sd3", tensors, {})


def back(tmp_path, artifact):
    base.save(artifact, tmp_path / "x.safetensors", "kohya", SPEC)
    return base.load(tmp_path / "x.safetensors", SPEC).tensors


@pytest.mark.parametrize("alpha, dtype", [(1.7, torch.float32), (2.0, torch.float16), (0.3, torch.bfloat16)])
def test_a_round_trip_is_bit_for_bit(layers, tmp_path, alpha, dtype):
    whole = adapter(layers, alpha, dtype)
    some = {path: shape for path, shape in layers.items() if not path.endswith(("to_k", "add_q_proj", "add_k_proj"))}
    for artifact in (whole, adapter(some, alpha, dtype), adapter(layers, kind="difference")):
        found = back(tmp_path, artifact)
        assert found.keys() == artifact.tensors.keys()
        assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in artifact.tensors.items())
    assert identify(base.read_header(tmp_path / "x.safetensors"))["modules"] == {"denoiser": len(layers)}


def test_the_file_holds_the_same_change_under_the_original_names(layers):
    """Through the table by which whole checkpoints are written."""
    artifact = adapter(layers)
    tensors, _ = kohya.encode(artifact, SPEC)
    ours = {f"{path}.weight": core(module) for (_, path), module in modules(artifact.tensors).items()}
    wanted = dict(_original.write(ours, _original.rows("mmdit", ours)))
    assert {"joint_blocks.0.x_block.attn.qkv.weight", "joint_blocks.0.x_block.attn2.qkv.weight",
            "joint_blocks.2.context_block.attn.qkv.weight", "final_layer.adaLN_modulation.1.weight"} <= wanted.keys()
    assert len(tensors) == 3 * len(wanted)
    for name, change in wanted.items():
        stem = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        a, b, alpha = (tensors[f"{stem}.{role}"] for role in ("lora_down.weight", "lora_up.weight", "alpha"))
        torch.testing.assert_close(b @ a * (alpha.float() / len(a)), change, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank, alpha", [(4, 2.0), (3, 1.0), (6, None)])
def test_a_fused_lora_of_others_is_taken_apart_exactly(rank, alpha):
    down, up = torch.randn(rank, WIDTH), torch.randn(3 * WIDTH, rank)
    name = "lora_unet_joint_blocks_11_context_block_attn_qkv"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    tensors |= {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}
    found = modules(kohya.decode(tensors, {}, SPEC).tensors)
    paths = [f"transformer_blocks.11.attn.add_{letter}_proj" for letter in "qkv"]
    assert [path for _, path in found] == sorted(paths)
    change = torch.cat([core(found["denoiser", path]) for path in paths])
    assert torch.allclose(change, up @ down * ((rank if alpha is None else alpha) / rank), atol=1e-6)


@pytest.mark.parametrize("roles", [
    {"diff": torch.randn(3 * WIDTH, WIDTH), "diff_b": torch.randn(3 * WIDTH)},
    {"lokr_w1": torch.randn(4, 4), "lokr_w2": torch.randn(3 * WIDTH // 4, WIDTH // 4), "alpha": torch.tensor(1.0)},
    {f"hada_w{i}_{side}": torch.randn((3 * WIDTH, 2) if side == "a" else (2, WIDTH)) for i in "12" for side in "ab"}],
    ids=lambda roles: next(iter(roles)))
def test_other_changes_of_a_fused_layer_are_taken_apart_too(roles):
    file = {f"lora_unet_joint_blocks_0_x_block_attn2_qkv.{role}": t for role, t in roles.items()}
    found = modules(kohya.decode(file, {}, SPEC).tensors)
    paths = [f"transformer_blocks.0.attn2.to_{letter}" for letter in "qkv"]
    whole = core({role: roles[role] for role in roles} | ({"alpha": torch.tensor(2.0)} if "hada_w1_a" in roles else {}))
    torch.testing.assert_close(torch.cat([core(found["denoiser", path]) for path in paths]), whole)
    if "diff_b" in roles:
        assert torch.equal(torch.cat([found["denoiser", path]["diff_b"] for path in paths]), roles["diff_b"])


def test_what_cannot_be_fused_or_taken_apart_is_refused(layers):
    qkv = {f"transformer_blocks.0.attn.to_{letter}": (WIDTH, WIDTH) for letter in "qkv"}
    uneven = adapter(qkv).tensors | {"denoiser.transformer_blocks.0.attn.to_k.lora_A": torch.ones(3, WIDTH),
                                     "denoiser.transformer_blocks.0.attn.to_k.lora_B": torch.ones(WIDTH, 3)}
    with pytest.raises(FinetuneError, match="ranks differ: export as diffusers"):
        kohya.encode(Artifact("lora", "sd3", uneven, {}), SPEC)
    with pytest.raises(FinetuneError, match="no layer of the original"):
        _joint.fused({"denoiser.transformer_blocks.0.odd.lora_A": torch.ones(1, 4)})
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    with pytest.raises(FinetuneError, match="dora_scale cannot be taken apart"):
        kohya.decode({f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(12, 2),
                      f"{name}.dora_scale": torch.ones(1, 4)}, {}, SPEC)
