"""Real training on the tiny base: what comes out, and that nothing beside the recipe changes it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.artifact import read_tensors, write_safetensors
from finetune.families._source import TINY

ROOT = Path(__file__).resolve().parents[2]


def settings(**values) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


def adapter(run) -> dict:
    return load_file(run / "adapter" / "small.safetensors")


def relative(a: dict, b: dict) -> float:
    """‖a − b‖ / ‖b‖ over the whole adapter."""
    assert a.keys() == b.keys()
    trained = [k for k in a if not k.endswith("alpha")]
    return float(sum((a[k] - b[k]).square().sum() for k in trained) / sum(b[k].square().sum() for k in trained)) ** 0.5


def test_the_run_folder_is_what_the_contract_says(recipe, train, tmp_path):
    assert train(recipe, tmp_path / "run", *settings(export="[kohya, diffusers]")) == 0
    run = tmp_path / "run"
    for name in ("recipe.yaml", "resolved.yaml", "run.json", "metrics.jsonl", "log.txt",
                 "adapter/small.safetensors", "adapter/small.diffusers.safetensors", "adapter/verify.json"):
        assert (run / name).is_file(), name
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]
    # The resolved recipe is a recipe that gives the same run.
    assert train(run / "resolved.yaml", run) == 0


def test_nothing_private_is_in_the_adapter(recipe, train, tmp_path):
    assert train(recipe, tmp_path / "run") == 0
    assert str(tmp_path).encode() not in (tmp_path / "run" / "adapter" / "small.safetensors").read_bytes()


@pytest.mark.parametrize("split", [{"train__batch_size": 4, "train__gradient_accumulation": 1},
                                   {"train__batch_size": 1, "train__gradient_accumulation": 4}], ids=["4x1", "1x4"])
def test_any_split_of_a_step_trains_the_same(recipe, train, tmp_path, split):
    plain = settings(method__dropout=0)     # dropout draws per forward pass
    assert train(recipe, tmp_path / "2x2", *plain) == 0
    assert train(recipe, tmp_path / "other", *plain, *settings(**split)) == 0
    assert relative(adapter(tmp_path / "other"), adapter(tmp_path / "2x2")) <= 1e-5


def test_random_crops_are_encoded_in_the_loop(recipe, train, tmp_path):
    assert train(recipe, tmp_path / "run", *settings(data__crop="random", train__max_steps=3)) == 0


def test_gradient_checkpointing_trains_the_same(recipe, train, tmp_path):
    short = settings(train__max_steps=3)
    assert train(recipe, tmp_path / "plain", *short) == 0
    for how in ("true", "selective"):
        assert train(recipe, tmp_path / how, *short, *settings(train__gradient_checkpointing=how)) == 0
        found, plain = adapter(tmp_path / how), adapter(tmp_path / "plain")
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_the_adapter_is_float32_and_moves_on_a_bfloat16_base(recipe, train, tmp_path):
    assert train(recipe, tmp_path / "run", *settings(base__dtype="bfloat16", train__mixed_precision="bf16")) == 0
    tensors = adapter(tmp_path / "run")
    assert all(t.dtype == torch.float32 for t in tensors.values())
    assert all(t.any() for name, t in tensors.items() if "lora_up" in name)


def test_a_diverged_run_writes_no_adapter(recipe, train, tmp_path, capsys):
    assert train(recipe, tmp_path / "run", *settings(train__learning_rate="1e30", train__clip_norm="null")) == 2
    assert "not finite" in capsys.readouterr().err
    assert not list((tmp_path / "run" / "adapter").iterdir())


def test_two_processes_train_the_same_as_one(recipe, train, train_by_two, tmp_path):
    plain = settings(method__dropout=0, train__max_steps=4)
    one = [*plain, *settings(train__batch_size=4, train__gradient_accumulation=1)]
    assert train(recipe, tmp_path / "one", *one) == 0
    two = [*plain, *settings(train__batch_size=2, train__gradient_accumulation=1, every__log=4)]
    train_by_two(recipe, tmp_path / "two", *two)
    assert relative(adapter(tmp_path / "two"), adapter(tmp_path / "one")) <= 1e-5
    said = json.loads((tmp_path / "two" / "metrics.jsonl").read_text())
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000004")       # the other is in the middle of the line
    train_by_two(recipe, tmp_path / "two", *two)
    again = json.loads((tmp_path / "two" / "metrics.jsonl").read_text())
    assert again["loss"] == said["loss"] and again["grad_norm"] == said["grad_norm"]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_trains_two_steps(path, train, tmp_path, pictures, member):
    from finetune.recipe import load

    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# accelerate launch -m finetune train recipes/{path.name}")
    bases = {"sd21": "sd21", "sdxl": "sdxl", "sd3": "sd3-medium", "sd15_inpainting": "sd15-inpainting",
             "upscaler": "x4-upscaler"}
    base = next((member(name) for start, name in bases.items() if path.stem.startswith(start)), "tiny")
    recipe = load(path).recipe
    assert (recipe.base.family == "sd1" and not recipe.data.inpaint) == (base == "tiny")
    small = settings(base__path=base, base__variant="null", data__resolution=64, train__max_steps=2, train__warmup_steps=0,
                     train__batch_size=24 if path.stem == "tiny_attributes" else 1, every__preview=0)      # each word is seen
    if base != "tiny":      # a CPU takes a minute for a step of real depth in bfloat16
        small += settings(base__dtype="float32", train__mixed_precision='"no"', train__gradient_accumulation=1)
    own = [] if path.stem.startswith("tiny_") else settings(data__images=pictures)
    own += settings(data__condition=pictures) if own and recipe.data.condition else []
    assert train(path, tmp_path / "run", *small, *own) == 0
    adapters = tmp_path / "run" / "adapter"
    proven = json.loads((adapters / "verify.json").read_text())
    assert proven and all((adapters / name).exists() for name in proven)
    adapter = adapters / f"{path.stem}.safetensors"
    if path.stem == "quickstart":
        assert adapter.stat().st_size <= 500_000


def test_a_file_that_is_not_what_was_trained_is_refused(recipe, train, tmp_path, monkeypatch, capsys):
    """The proof compares with the training model: an export that is wrong in itself does not get its name."""
    from finetune.train import export

    real = export.write

    def wrong(artifacts, *rest):
        artifact = artifacts[""]
        doubled = {name: 2 * t if name.endswith("lora_B") else t for name, t in artifact.tensors.items()}
        return real({"": type(artifact)(artifact.kind, artifact.family, doubled, artifact.metadata)}, *rest)

    monkeypatch.setattr(export, "write", wrong)
    assert train(recipe, tmp_path / "run") == 2
    assert "FAIL  diffusers at strength 0.5" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "run" / "adapter").iterdir()) == ["small.refused", "verify.json"]
    monkeypatch.setattr(export, "write", real)
    assert train(recipe, tmp_path / "run") == 0


def test_what_cannot_be_proven_does_not_keep_its_name(recipe, train, tmp_path, monkeypatch, capsys):
    """The text encoder, which is loaded again for the proof, was changed on disk meanwhile."""
    from finetune.train import export

    shutil.copytree(TINY, tmp_path / "base")
    real = export.write

    def write(*args):
        file = tmp_path / "base" / "text_encoder" / "model.safetensors"
        write_safetensors(file, {name: t + 1 for name, t in read_tensors(file).items()}, {"format": "pt"})
        return real(*args)

    monkeypatch.setattr(export, "write", write)
    assert train(recipe, tmp_path / "run", "--set", f"base.path={tmp_path / 'base'}") == 2
    said = capsys.readouterr().err
    assert "the weights of its text are others than at the start" in said and "small.refused" in said
    assert [p.name for p in (tmp_path / "run" / "adapter").iterdir()] == ["small.refused"]


def test_a_start_that_was_killed_before_it_was_a_run_can_be_repeated(recipe, train, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "log.txt").write_text("base tiny\n")
    gone = 2**31 - 1        # no process has this number
    for torn in (f".run.json.{gone}.part", f"adapter/best/.small.safetensors.{gone}.part",
                 f"checkpoints/.step-00000002.part/.manifest.json.{gone}.part"):
        (tmp_path / "run" / torn).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / torn).write_text('{"exa')
    assert train(recipe, tmp_path / "run") == 0
    assert not list((tmp_path / "run").rglob("*.part"))


def test_encoders_are_let_go_for_the_steps(recipe, tmp_path, train, monkeypatch):
    """Held all the time, they change no bit; and the proof loads what it needs again. Nor does what frozen layers keep."""
    from finetune.train import ground, lean, loop

    monkeypatch.setattr(lean, "WORTH", 0)
    real, held = loop.one_step, []
    monkeypatch.setattr(loop, "one_step", lambda run, *rest: (held.append(set(run.family.parts)), real(run, *rest))[1])
    assert train(recipe, tmp_path / "lean") == 0
    assert set.union(*held) == {"denoiser"}
    monkeypatch.setattr(ground, "let_go", lambda *_: None)
    assert train(recipe, tmp_path / "whole", "--set", "train.lean=false") == 0
    assert held[-1] == {"denoiser", "text", "vae"}
    less, whole = adapter(tmp_path / "lean"), adapter(tmp_path / "whole")
    assert less.keys() == whole.keys() and all(torch.equal(t, whole[name]) for name, t in less.items())
