"""Single files in the original naming: what goes out comes back bit for bit, and diffusers reads the same from it."""

import math

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import load_file, save_file

from finetune import registry
from finetune.artifact import published
from finetune.errors import FinetuneError
from finetune.families import _original, _single, sd1, sdxl
from finetune.families._identify import LAYOUTS, Known, identify
from finetune.families._source import Changes
from finetune.header import Header, read_header

FAMILIES = {"sd15": "sd1", "sd15-inpainting": "sd1", "sd21-base": "sd2", "sd21": "sd2", "sd2-inpainting": "sd2",
            "sdxl": "sdxl", "sdxl-inpainting": "sdxl", "sd3-medium": "sd3", "sd35-medium": "sd3", "sd35-large": "sd3"}
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
            xl = name.startswith("sdxl")
            config |= {"block_out_channels": [8, 16, 24, 24][:len(config["block_out_channels"])],
                       "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 20 if xl else 8,
                       "projection_class_embeddings_input_dim": 20 if xl else None, "addition_time_embed_dim": 2}
        elif component == "transformer":
            heads = 2
            config |= {"num_attention_heads": heads, "attention_head_dim": 4, "caption_projection_dim": 4 * heads,
                       "joint_attention_dim": 12, "pooled_projection_dim": 18, "pos_embed_max_size": 6}
        elif component == "vae":
            config |= {"block_out_channels": [4, 8, 12, 12], "norm_num_groups": 2}
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
        elif kind == "open_clip":
            found = theirs.convert_open_clip_checkpoint(module, tensors, prefix)
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


# name: the tensors of its denoiser, VAE and text encoders in the original file, and the parameters of the denoiser
REAL = {
    "sd15": ([686, 248, 196], 859_520_964), "sd15-inpainting": ([686, 248, 196], 859_535_364),
    "sd21": ([686, 248, 280], 865_910_724), "sd2-inpainting": ([686, 248, 280], 865_925_124),
    "sdxl": ([1680, 248, 196, 389], 2_567_463_684), "sdxl-inpainting": ([1680, 248, 196, 389], 2_567_478_084),
    "sd3-medium": ([491, 244, 196, 517, 219], 2_028_328_000), "sd35-medium": ([665, 244, 196, 517, 219], 2_243_171_520),
    "sd35-large": ([923, 244, 196, 517, 219], 8_056_627_520),
}
# What the published files have beside.
BESIDE = {
    "sd1": {"betas": (1000,), "alphas_cumprod": (1000,), "sqrt_recipm1_alphas_cumprod": (1000,), "posterior_variance": (1000,),
            "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77), "model_ema.decay": (), "model_ema.num_updates": ()},
    "sd2": {"betas": (1000,), "scale_factor": (), "cond_stage_model.model.logit_scale": (),
            "cond_stage_model.model.text_projection": (1024, 1024),
            "cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight": (3072, 1024)},
    "sdxl": {"denoiser.sigmas": (1000,), "conditioner.embedders.1.model.logit_scale": (),
             "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": (1, 77)},
    "sd3": {"text_encoders.clip_l.logit_scale": (), "text_encoders.clip_l.transformer.text_projection.weight": (768, 768)},
}


def real(name: str) -> dict[str, dict[str, tuple[str, tuple]]]:
    """Of each component: the original names of its tensors at their real sizes, and their shapes."""
    configs, found = _single.configs(known(name)), {}
    for component, (kind, prefix) in LAYOUTS[FAMILIES[name]].items():
        library, cls = configs["model_index"][component]
        module = _single.empty(getattr({"diffusers": diffusers, "transformers": transformers}[library], cls), configs[component])
        shapes = {own: tuple(t.shape) for own, t in ours(module).items()}
        table = _original.rows(kind, shapes)
        assert sorted(own for row in table for own in row.ours) == sorted(shapes)       # each of ours once
        found[component] = {prefix + row.theirs: ("F16", row.shape(shapes)) for row in table if row.theirs}
    return found


@pytest.mark.parametrize("name", REAL)
def test_the_published_models_are_known_by_their_keys(name):
    counts, size = REAL[name]
    found = real(name)
    assert [len(tensors) for tensors in found.values()] == counts
    whole = {key: value for tensors in found.values() for key, value in tensors.items()}
    assert len(whole) == sum(counts)
    buffer = math.prod(whole.get("model.diffusion_model.pos_embed", ("", (0,)))[1])
    assert sum(math.prod(shape) for _, shape in next(iter(found.values())).values()) - buffer == size

    beside = {key: ("F32", shape) for key, shape in BESIDE[FAMILIES[name]].items()}
    seen = identify(Header(whole | beside, {"modelspec.prediction_type": "v"}, {}))
    assert (seen.name, seen.family, seen.places) == (name, FAMILIES[name], LAYOUTS[FAMILIES[name]])
    assert [note[:39] for note in seen.notes] == ["it also has 2 tensors of a moving avera"] * (seen.family == "sd1")
    alone = identify(Header(next(iter(found.values())), {}, {}))       # no text encoders, no VAE
    assert (alone.family, len(alone.places), alone.prediction) == (FAMILIES[name], 1, None)
    bare = identify(Header({key.removeprefix("model.diffusion_model."): v for key, v in next(iter(found.values())).items()}, {}, {}))
    assert {*bare.places.values()} == {(next(iter(seen.places.values()))[0], "")}


def test_names_as_they_were_published():
    """A few by hand, from the published files."""
    known = {
        "sd15": {"model.diffusion_model.input_blocks.3.0.op.weight", "model.diffusion_model.output_blocks.2.1.conv.bias",
                 "model.diffusion_model.output_blocks.5.2.conv.weight", "model.diffusion_model.input_blocks.4.0.skip_connection.weight",
                 "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight",
                 "model.diffusion_model.input_blocks.1.0.emb_layers.1.weight", "model.diffusion_model.out.2.weight",
                 "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_out.0.bias",
                 "first_stage_model.encoder.down.0.block.1.norm2.weight", "first_stage_model.decoder.up.3.block.0.conv1.weight",
                 "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight", "first_stage_model.decoder.mid.attn_1.proj_out.weight",
                 "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.bias"},
        "sdxl": {"model.diffusion_model.label_emb.0.2.weight", "model.diffusion_model.output_blocks.2.2.conv.weight",
                 "model.diffusion_model.input_blocks.7.1.transformer_blocks.9.attn1.to_q.weight",
                 "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_bias",
                 "conditioner.embedders.1.model.positional_embedding", "conditioner.embedders.1.model.text_projection"},
        "sd35-medium": {"model.diffusion_model.joint_blocks.12.x_block.attn2.ln_k.weight",
                        "model.diffusion_model.joint_blocks.23.context_block.attn.qkv.bias",
                        "model.diffusion_model.final_layer.adaLN_modulation.1.weight", "model.diffusion_model.y_embedder.mlp.0.bias",
                        "text_encoders.t5xxl.transformer.shared.weight", "first_stage_model.decoder.conv_in.weight"},
    }
    for name, keys in known.items():
        found = {key for tensors in real(name).values() for key in tensors}
        assert keys <= found, keys - found
        assert "model.diffusion_model.joint_blocks.23.context_block.attn.proj.weight" not in found


def test_what_a_file_says_of_its_noising(member, tmp_path):
    name, _, _, file = member
    if name == "sd21":      # neither key nor shape tells: a norm does, as in ComfyUI
        tensors = load_file(file)
        bias = tensors["model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"]
        for spread, wanted in ((0.2, ("sd21", "v_prediction")), (0.02, ("sd21-base", "epsilon"))):
            bias.copy_(torch.linspace(-spread, spread, len(bias)))
            save_file(tensors, tmp_path / "model.safetensors")
            source = _single.source(tmp_path / "model.safetensors")
            assert (source.known.name, source.config("scheduler")["prediction_type"]) == wanted
            assert "does not say what it predicts" in source.known.notes[0] and source.config("unet")["use_linear_projection"]
    elif name == "sdxl":
        save_file(load_file(file) | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, tmp_path / "v.safetensors")
        source = _single.source(tmp_path / "v.safetensors")
        scheduler = source.scheduler()
        assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.rescale_betas_zero_snr
        assert source.index["scheduler"] == ["diffusers", type(scheduler).__name__] and source.has("text_encoder_2")
        assert source.tokenizer("tokenizer_2").pad_token_id == 0
    elif name == "sd3-medium":
        source = _single.source(file)
        assert not source.has("text_encoder_3") and source.has("text_encoder_2")
        with pytest.raises(FinetuneError, match="T5.* is not in such a file; train without T5"):
            source.tokenizer("tokenizer_3")


def test_clips_vocabulary():
    words = _single.clip_tokenizer(_single.configs(known("sd15"))["tokenizer"])
    assert len(words) == 49408 and words.model_max_length == 77 and words.pad_token_id == 49407
    assert words("A photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_a_file_that_is_not_whole_or_of_another_model_is_refused(tmp_path):
    configs = shrunk("sd15")
    modules = parts(configs)
    tensors = original("sd1", modules)
    file = tmp_path / "model.safetensors"

    def problem(changed: dict, component: str = "unet") -> str:
        save_file(changed, file)
        with pytest.raises(FinetuneError) as error:
            found = identify(read_header(file))
            _single.SingleFile(str(file), found, configs).load(type(modules[component]), component, torch.float32)
        return str(error.value)

    key = "model.diffusion_model.out.2.weight"
    assert f"its unet lacks 1 of 686 tensors, for example {key}" in problem({k: t for k, t in tensors.items() if k != key})
    assert "it holds no vae" in problem({k: t for k, t in tensors.items() if not k.startswith("first_")}, "vae")
    assert "has 1 tensors that this model has no place for" in problem(tensors | {"model.diffusion_model.extra.weight": torch.ones(1)})
    other = original("sd3", {"vae": parts(shrunk("sd3-medium"))["vae"]})
    said = problem({k: t for k, t in tensors.items() if not k.startswith("first_")} | other, "vae")
    assert "decoder.conv_in.weight: (12, 16, 3, 3), and (12, 4, 3, 3) is needed; it is of another model" in said

    save_file(tensors, file)
    whole = file.read_bytes()
    with pytest.raises(FinetuneError, match="base.path: .*other shapes than this model's"):     # thinner than what is published
        registry.find("families", "sd1").load(str(file))
    with pytest.raises(FinetuneError, match="base.family: sdxl, but .* is sd1: use family: sd1"):
        registry.find("families", "sdxl").load(str(file))
    file.write_bytes(whole[:-100])
    with pytest.raises(FinetuneError, match="cut, damaged"):
        _single.source(file)
    file.rename(tmp_path / "model.ckpt")
    with pytest.raises(FinetuneError, match="is a pickle"):
        _single.source(tmp_path / "model.ckpt")


def test_flat_text_encoders_are_read_and_more_layers_than_ours_are_dropped(tmp_path):
    configs = shrunk("sd15")
    modules = parts(configs)
    save_file({key.replace("text_model.", ""): t for key, t in original("sd1", modules).items()}, tmp_path / "flat.safetensors")
    found = identify(read_header(tmp_path / "flat.safetensors"))
    again = _single.SingleFile(str(tmp_path / "flat.safetensors"), found, configs).load(
        type(modules["text_encoder"]), "text_encoder", torch.float32)
    assert same(again.state_dict(), modules["text_encoder"].state_dict())

    configs = shrunk("sd21")
    modules = parts(configs)
    tensors = original("sd2", modules)
    start = "cond_stage_model.model.transformer.resblocks."
    more = {key.replace(f"{start}22.", f"{start}23."): t.clone() for key, t in tensors.items() if key.startswith(f"{start}22.")}
    save_file(tensors | more | {"cond_stage_model.model.text_projection": torch.ones(8, 8)}, tmp_path / "sd2.safetensors")
    found = identify(read_header(tmp_path / "sd2.safetensors"))
    again = _single.SingleFile(str(tmp_path / "sd2.safetensors"), found, configs).load(
        type(modules["text_encoder"]), "text_encoder", torch.float32)
    assert len(more) == 12 and "24th layer of its text encoder is not used" in found.notes[0] and same(again.state_dict(), modules["text_encoder"].state_dict())


def test_a_projection_that_is_a_linear_layers(tmp_path):
    """diffusers' scripts/convert_diffusers_to_original_sdxl.py leaves it as it is, and ComfyUI reads both."""
    configs = shrunk("sdxl")
    modules = parts(configs)
    tensors, start = original("sdxl", modules), "conditioner.embedders.1.model.text_projection"
    save_file(tensors | {f"{start}.weight": tensors.pop(start).t().contiguous()}, tmp_path / "sdxl.safetensors")
    again, encoder = _single.source(tmp_path / "sdxl.safetensors"), modules["text_encoder_2"]
    found = _single.load(again.path, again.known.places["text_encoder_2"], type(encoder), configs["text_encoder_2"], torch.float32)
    assert same(found.state_dict(), encoder.state_dict())


def test_a_projection_that_the_file_cannot_hold_is_refused():
    modules = parts(shrunk("sd3-medium"))
    torch.nn.init.normal_(modules["text_encoder"].text_projection.weight)
    with pytest.raises(FinetuneError, match="text_projection.weight .* is no identity.*diffusers folder"):
        original("sd3", {"text_encoder": modules["text_encoder"]})


def test_a_part_comes_from_a_folder_or_a_file_and_fits_the_base(tmp_path):
    AutoencoderKL, CLIPTextModel = diffusers.AutoencoderKL, transformers.CLIPTextModel
    configs = shrunk("sd15")
    modules = parts(configs)
    vae, text = modules["vae"], modules["text_encoder"]
    vae.save_pretrained(tmp_path / "base" / "vae")
    save_file(original("sd1", modules), tmp_path / "whole.safetensors")
    bare = {key.removeprefix("first_stage_model."): t for key, t in original("sd1", {"vae": vae}).items()}
    save_file(bare, tmp_path / "vae.safetensors")
    save_file(ours(text), tmp_path / "clip.safetensors")
    for path in ("base", "base/vae", "base/vae/diffusion_pytorch_model.safetensors", "whole.safetensors", "vae.safetensors"):
        found = _single.part(tmp_path / path, AutoencoderKL, "vae", torch.float32, configs["vae"])
        assert same(found.state_dict(), vae.state_dict()), path
    for path in ("whole.safetensors", "clip.safetensors"):
        found = _single.part(tmp_path / path, CLIPTextModel, "text_encoder", torch.float32, configs["text_encoder"])
        assert same(found.state_dict(), text.state_dict()), path

    for path, config, said in (
        ("base", {"scaling_factor": 0.13025}, "base: its scaling_factor is 0.18215, and the base's is 0.13025"),
        ("whole.safetensors", {"scaling_factor": 0.13025}, "its scaling_factor is 0.18215"),
        ("base/vae", {"latent_channels": 16}, "tensors are not of the base's shape"),
        ("vae.safetensors", {"latent_channels": 16}, "other shapes than this model's"),
        ("clip.safetensors", {}, "it holds no vae, but text_encoder"),
    ):
        with pytest.raises(FinetuneError, match=said):
            _single.part(tmp_path / path, AutoencoderKL, "vae", torch.float32, configs["vae"] | config)


def test_a_checkpoint_without_text_encoders_is_no_refiner(tmp_path, monkeypatch):
    found, modules = shrunk("sdxl"), parts(shrunk("sdxl"))
    monkeypatch.setattr(_single, "configs", lambda known: found)
    save_file(original("sdxl", {"unet": modules["unet"], "vae": modules["vae"]}), tmp_path / "pruned.safetensors")
    with pytest.raises(FinetuneError, match="it holds no text_encoder and no text_encoder_2: .* base.text .* and base.text_2"):
        sdxl.outline(str(tmp_path / "pruned.safetensors"))
    for name in ("text_encoder", "text_encoder_2"):
        modules[name].save_pretrained(tmp_path / name)
    beside = Changes({"text": str(tmp_path / "text_encoder"), "text_2": str(tmp_path / "text_encoder_2")})
    assert same(sdxl.load(str(tmp_path / "pruned.safetensors"), changes=beside).parts["text_2"].state_dict(),
                modules["text_encoder_2"].state_dict())


def test_a_checkpoint_without_a_vae_takes_one(tmp_path, monkeypatch):
    found, modules = shrunk("sd15"), parts(shrunk("sd15"))
    monkeypatch.setattr(_single, "configs", lambda known: found)
    file = tmp_path / "pruned.safetensors"
    save_file(original("sd1", {name: module for name, module in modules.items() if name != "vae"}), file)
    modules["vae"].save_pretrained(tmp_path / "vae")
    with pytest.raises(FinetuneError, match="it holds no vae: give a whole checkpoint, or beside it base.vae"):
        sd1.load(str(file))
    diffusers.AutoencoderKL.from_config(found["vae"] | {"scaling_factor": 0.13025}).save_pretrained(tmp_path / "other")
    with pytest.raises(FinetuneError, match="base.vae: .*its scaling_factor is 0.13025, and the base's is 0.18215"):
        sd1.load(str(file), changes=Changes({"vae": str(tmp_path / "other")}))
    family = sd1.load(str(file), changes=Changes({"vae": str(tmp_path / "vae")}))
    assert same(family.parts["vae"].state_dict(), modules["vae"].state_dict())
    assert same(family.parts["denoiser"].state_dict(), modules["unet"].state_dict())
