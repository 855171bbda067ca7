"""Every method on a narrow member of each family that the bundled base is not: trained, written, proven, sampled, merged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune import registry
from finetune.cli import main
from finetune.families import _single
from finetune.families._source import TINY, kind_of, locate
from finetune.formats import single_file

LORA = "{kind: lora, rank: 2, alpha: 3, targets: [%s], text: {targets: [all]}}"
EMBEDDING = "{kind: embedding, tokens: {zkw-cat: {init: a red circle, vectors: 2}}}"


@pytest.fixture(params=["sd21", "sdxl", "sd35-medium"])
def base(request, member):
    return str(member(request.param))


@pytest.fixture
def write(tmp_path, pictures, base):
    """A recipe of two steps: (method, more lines) → path."""
    def make(method: str, template: str = "{text}", more: str = "") -> Path:
        file = tmp_path / "small.yaml"
        file.write_text(f"""
base: {{family: {kind_of(locate(base))}, path: {base}}}
data: {{images: "{pictures}", resolution: 64, caption: {{dropout: 0.2, template: "{template}"}}}}
method: {method}
train: {{max_steps: 2, batch_size: 2, learning_rate: 1e-2, threads: 1}}
every: {{log: 1, checkpoint: 1}}
{more}
""")
        return file

    return make


def passed(run) -> dict[str, list[str]]:
    """The names of the checks that each file has passed."""
    found = json.loads((run / "adapter" / "verify.json").read_text())
    assert all(check["passed"] for checks in found.values() for check in checks)
    return {name: [check["name"] for check in checks] for name, checks in found.items()}


@pytest.mark.parametrize("base", ["sd21", "sdxl", "sd35-medium", "sd3-medium"], indirect=True)     # the last has no T5
def test_a_lora_of_all_parts_is_written_proven_sampled_and_merged(write, train, tmp_path, base, capsys):
    family = kind_of(locate(base))
    recipe = write(LORA % ("all" if family == "sd3" else "all, conv"), more="export: [kohya, diffusers]")
    assert train(recipe, tmp_path / "run") == 0
    checks = passed(tmp_path / "run")
    assert len(checks) == 2 and "diffusers at strength 0.5" in checks["small.diffusers.safetensors"]
    assert ("merged by finetune at 0.5" if family == "sd3" else "diffusers at strength 0.5") in checks["small.safetensors"]
    kohya, plain = (tmp_path / "run" / "adapter" / name for name in ("small.safetensors", "small.diffusers.safetensors"))
    names = {name.partition(".")[0] for name in load_file(kohya)}
    if family == "sdxl":
        assert {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", "lora_unet_output_blocks_2_2_conv",
                "lora_te1_text_model_encoder_layers_2_mlp_fc1", "lora_te2_text_model_encoder_layers_2_mlp_fc1"} <= names
    elif family == "sd3":
        assert {"lora_unet_joint_blocks_1_x_block_mlp_fc1", "lora_unet_joint_blocks_2_context_block_attn_qkv",
                "lora_te1_text_model_encoder_layers_2_mlp_fc1", "lora_te2_text_model_encoder_layers_2_mlp_fc1"} <= names
    else:
        assert {"lora_unet_down_blocks_0_attentions_0_proj_in", "lora_te_text_model_encoder_layers_2_mlp_fc1"} <= names
    header = capsys.readouterr().err
    assert f"({family}, {({'sd2': 'v_prediction', 'sd3': 'flow'}).get(family, 'epsilon')}, float32)" in header

    out = tmp_path / "out"
    assert main(["convert", str(plain), "--family", family, "--to", "kohya",
                 "--out", str(tmp_path / "again.safetensors")]) == 0
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[name], t) for name, t in load_file(kohya).items())
    assert main(["sample", "--base", base, "--family", family, "--adapter", f"{kohya}:0.5", "--prompt", "a red circle",
                 "--steps", "1", "--size", "64x64", "--out", str(out)]) == 0
    assert main(["merge", "--base", base, "--family", family, "--adapter", str(plain), "--dtype", "float16", "--out",
                 str(tmp_path / "merged")]) == 0
    merged = registry.find("families", family).load(str(tmp_path / "merged"), torch.float16)
    assert merged.parts["vae"].dtype == (torch.float32 if family == "sdxl" else torch.float16)
    moments = merged.moments(torch.zeros(1, 3, 64, 64))
    picture = merged.pipeline()("a red circle", num_inference_steps=1, height=64, width=64).images[0]
    assert moments.isfinite().all() and picture.size == (64, 64)


def test_learned_tokens_are_in_every_encoder_and_a_run_goes_on_where_it_was_cut(write, train, tmp_path, base):
    recipe = write(EMBEDDING, "{text} zkw-cat")
    assert train(recipe, tmp_path / "run") == 0
    file = tmp_path / "run" / "adapter" / "zkw-cat.safetensors"
    whole = file.read_bytes()
    (tmp_path / "run" / "adapter").rename(tmp_path / "whole")
    (tmp_path / "run" / "checkpoints" / "step-00000002").rename(tmp_path / "gone")
    assert train(recipe, tmp_path / "run") == 0 and file.read_bytes() == whole
    assert "prompts in diffusers" in passed(tmp_path / "run")["zkw-cat.safetensors"]
    found = {name: tuple(t.shape) for name, t in load_file(file).items()}
    family = kind_of(locate(base))
    both = family in ("sdxl", "sd3")
    assert found == ({"clip_l": (2, 32), "clip_g": (2, 64)} if both else {"emb_params": (2, 32)})
    assert main(["sample", "--base", base, "--family", family, "--adapter", str(file), "--prompt", "a zkw-cat on white",
                 "--steps", "1", "--size", "64x64", "--out", str(tmp_path / "out")]) == 0


def test_a_full_fine_tune_with_class_pictures_and_long_captions(write, train, tmp_path, base):
    recipe = write("{kind: full, targets: [cross_attention], text: {}}", more="export: [diffusers, single_file]")
    flow = kind_of(locate(base)) == "sd3"
    words = ["--set", "data.prior={prompt: a circle, count: 2, steps: 1}",
             "--set", f"data.caption.long={'truncate' if flow else 'chunk'}",
             "--set", f"data.caption.template='{{text}} {'red blue ' * 50}'"]
    assert train(recipe, tmp_path / "run", *words) == 0
    assert passed(tmp_path / "run") == dict.fromkeys(["small", "small.safetensors"], ["loaded again as a base"])
    model = tmp_path / "run" / "adapter" / "small"
    wanted = {"transformer" if flow else "unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert {p.name for p in model.iterdir()} >= wanted
    for encoder in (folder for folder in model.glob("text_encoder*") if folder.name != "text_encoder_3"):
        found = {name.partition(".")[0] for name in load_file(encoder / "model.safetensors")}
        assert found <= {"text_model", "text_projection"}
        assert (model / encoder.name.replace("text_encoder", "tokenizer") / "merges.txt").is_file()


@pytest.mark.parametrize("base", ["sd35-medium"], indirect=True)
def test_sd3_from_a_single_file_and_its_patches(member, write, train, tmp_path, monkeypatch, capsys):
    """Its T5 has no vocabulary in such a file, so it is left out; sides have to be whole patches."""
    base, sd3 = member("sd35-medium"), registry.find("families", "sd3")
    family, file = sd3.load(str(base)), tmp_path / "whole.safetensors"
    single_file.write(family, file, torch.float32, {})
    own = {path.parent.name: json.loads(path.read_text()) for path in base.glob("*/config.json")}
    shipped = _single.configs
    monkeypatch.setattr(_single, "configs", lambda known: shipped(known) | own)
    again = sd3.load(str(file))
    assert family.parts.keys() - again.parts.keys() == {"text_3"} and again.tokenizers.keys() == {"text", "text_2"}
    for part, module in again.parts.items():
        state = module.state_dict()
        assert all(torch.equal(state[name], t) for name, t in family.parts[part].state_dict().items())
    assert (again.stride, again.step, again.path) == (8, 16, family.path)
    monkeypatch.undo()
    for side, code in ((64, 0), (72, 2)):
        assert main(["sample", "--base", str(base), "--family", "sd3", "--prompt", "x", "--steps", "1", "--size", f"64x{side}",
                     "--out", str(tmp_path / str(side))]) == code
    recipe = write("{kind: lora}")
    assert train(recipe, tmp_path / "run", "--set", f"base={{family: sd3, path: {base}}}", "--set", "data.resolution=72") == 2
    assert "72 is not a multiple of 16" in capsys.readouterr().err


def test_a_vae_decoder(write, train, tmp_path):
    more = "objective: {adversarial: {start: 1}}\nexport: [kohya, diffusers]"
    assert train(write("{kind: vae_decoder}", more=more), tmp_path / "run") == 0
    assert len(passed(tmp_path / "run")) == 2


@pytest.mark.parametrize("word", ["sd1", "sd2", "sdxl", "sd3"])
def test_a_wrong_family_is_told_the_right_one(word, base, write, train, tmp_path, capsys):
    right = kind_of(locate(base))
    if word != right:
        recipe = write("{kind: lora}")
        assert train(recipe, tmp_path / "run", "--set", f"base.family={word}") == 2
        assert f"is {right}: use family: {right}" in capsys.readouterr().err
    assert kind_of(locate(str(TINY))) == "sd1"


def test_the_refiner_is_refused(member, tmp_path, capsys):
    base = tmp_path / "refiner"
    base.mkdir()
    for item in member("sdxl").iterdir():
        (base / item.name).symlink_to(item)
    index = json.loads((member("sdxl") / "model_index.json").read_text()) | {
        "_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None], "requires_aesthetics_score": True}
    (base / "model_index.json").unlink()
    (base / "model_index.json").write_text(json.dumps(index))
    assert main(["sample", "--base", str(base), "--family", "sdxl", "--prompt", "x", "--out", str(tmp_path / "o")]) == 2
    assert "is the refiner of SDXL" in capsys.readouterr().err
