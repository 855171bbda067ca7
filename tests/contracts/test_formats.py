"""Every format gives back what it was given, and plain diffusers makes of its files what they say."""

import copy

import pytest
import torch

from finetune import registry
from finetune.artifact import Artifact, modules
from finetune.change import core
from finetune.formats import base
from finetune.formats._identify import identify
from finetune.header import read_header

SPEC = registry.find("families", "sd1").SPEC
FORMATS = [name for name in registry.names("formats") if "lora" in registry.find("formats", name).KINDS]
CONV = "up_blocks.0.resnets.0.conv1"
ROWS = "denoiser", "text"


def pipeline_parts():
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=4, cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=50, hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=48, eos_token_id=49, pad_token_id=49,
    ))
    return {"denoiser": unet.eval(), "text": text.eval()}


@pytest.fixture(scope="module")
def parts():
    return pipeline_parts()


def module_of(parts, part, path):
    names = dict(parts[part].named_modules())
    return names[path] if path in names else names[path.removeprefix("text_model.")]  # transformers >= 5.6


def adapter(parts, chosen=ROWS, alpha=2.0, dtype=torch.float32):
    """A LoRA on linear layers, a 1x1 and 3x3 convolutions, of ranks 4 and 3, with alpha equal to neither."""
    ends = "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "time_emb_proj"
    paths = {
        "denoiser": [name for name, _ in parts["denoiser"].named_modules() if name.endswith(ends)]
        + [CONV, "conv_in", "down_blocks.0.downsamplers.0.conv"],
        "text": [
            f"text_model.encoder.layers.{layer}.{name}"
            for layer in range(2) for name in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")
        ],
    }
    torch.manual_seed(1)
    tensors = {}
    for part in chosen:
        for index, path in enumerate(paths[part]):
            weight, rank = module_of(parts, part, path).weight, 3 if index % 5 == 1 else 4
            up_shape = weight.shape[0], rank, *[1] * (weight.ndim - 2)
            tensors[f"{part}.{path}.lora_A"] = (torch.randn(rank, *weight.shape[1:]) / 4).to(dtype)
            tensors[f"{part}.{path}.lora_B"] = (torch.randn(up_shape) / 4).to(dtype)
            tensors[f"{part}.{path}.alpha"] = torch.tensor(alpha)
    return Artifact("lora", "sd1", tensors, {"ss_output_name": "ink", "finetune.recipe": "a: 1\n"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chosen", [("denoiser",), ("text",), ROWS], ids="+".join)
@pytest.mark.parametrize("name", FORMATS)
def test_a_round_trip_is_bit_for_bit(parts, tmp_path, name, chosen, dtype):
    artifact, path = adapter(parts, chosen, 1.7, dtype), tmp_path / "x.safetensors"
    base.save(artifact, path, name, SPEC)
    back = base.load(path, SPEC)
    assert (back.kind, back.family) == (artifact.kind, artifact.family)
    assert back.tensors.keys() == artifact.tensors.keys()
    for key, tensor in artifact.tensors.items():
        assert back.tensors[key].dtype == tensor.dtype and torch.equal(back.tensors[key], tensor), key
    assert artifact.metadata.items() <= back.metadata.items()


@pytest.mark.parametrize("name", FORMATS)
def test_only_this_format_claims_its_files_and_the_header_says_what_they_are(parts, tmp_path, name):
    base.save(adapter(parts), tmp_path / "x.safetensors", name, SPEC)
    header = read_header(tmp_path / "x.safetensors")
    assert [other for other in FORMATS if registry.find("formats", other).reads(header)] == [name]
    facts = identify(header)
    assert (facts["kind"], facts["format"], facts["family"]) == ("lora", name, "sd1")
    assert facts["ranks"] == [3, 4] and facts["alphas"] == [2]
    assert facts["modules"]["text"] == 6


@pytest.mark.parametrize("name", FORMATS)
def test_equal_artifacts_give_equal_bytes(parts, tmp_path, name):
    artifact = adapter(parts)
    backwards = (dict(reversed(pairs.items())) for pairs in (artifact.tensors, artifact.metadata))
    shuffled = Artifact("lora", "sd1", *backwards)
    base.save(artifact, tmp_path / "a", name, SPEC)
    base.save(shuffled, tmp_path / "b", name, SPEC)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def seen(parts):
    """(denoiser output, text output) on fixed inputs, in float64."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 48, (2, 8), generator=generator)
    with torch.no_grad():
        tokens = parts["text"](ids)[0]
        return parts["denoiser"](x, torch.tensor([10, 700]), tokens)[0], tokens


@pytest.mark.parametrize("chosen", [("denoiser",), ROWS], ids="+".join)
@pytest.mark.parametrize("name", FORMATS)
def test_plain_diffusers_applies_exactly_the_deltas(parts, tmp_path, name, chosen):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    artifact = adapter(parts, chosen)
    base.save(artifact, tmp_path / "x.safetensors", name, SPEC)

    merged = {part: copy.deepcopy(module).double() for part, module in parts.items()}
    for (part, path), module in modules(artifact.tensors).items():
        module_of(merged, part, path).weight.data += core(module).double()
    loaded = {part: copy.deepcopy(module).double() for part, module in parts.items()}
    StableDiffusionPipeline(
        vae=None, tokenizer=None, scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None,
        unet=loaded["denoiser"], text_encoder=loaded["text"], requires_safety_checker=False,
    ).load_lora_weights(tmp_path, weight_name="x.safetensors")

    plain = seen({part: copy.deepcopy(module).double() for part, module in parts.items()})
    changed = 0
    for was, wanted, got in zip(plain, seen(merged), seen(loaded), strict=True):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()
        changed += (wanted - was).norm() > 1e-2 * was.norm()
    assert changed == len(chosen)
