"""train.compile: the same training but for rounding, and what is sampled, resumed and proven does not notice."""

import json

import pytest
from safetensors.torch import load_file

LORA = "method={kind: lora, rank: 2, targets: [cross_attention, conv1]}"


@pytest.mark.slow       # the compiler takes a minute
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_compiled_blocks_train_the_same_and_go_on_exactly(recipe, train, tmp_path, monkeypatch, checkpointing):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kept"))
    words = ["--set", LORA, "--set", "train.max_steps=4", "--set", "every.checkpoint=2", "--set", "every.log=1",
             "--set", f"train.gradient_checkpointing={checkpointing}"]
    files = []
    for name, more in (("plain", []), ("compiled", ["--set", "train.compile=true"])):
        run = tmp_path / name
        assert train(recipe, run, *words, *more) == 0
        losses = [row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
        files.append((losses, run / "adapter" / "small.safetensors"))
    (plain, one), (compiled, other) = files
    assert compiled == pytest.approx(plain, rel=1e-5) and list((tmp_path / "kept").rglob("*"))
    assert load_file(one).keys() == load_file(other).keys()

    whole = other.read_bytes()
    (run / "adapter").rename(tmp_path / "whole")
    (run / "checkpoints" / "step-00000004").rename(tmp_path / "gone")
    assert train(recipe, run, *words, "--set", "train.compile=true") == 0 and other.read_bytes() == whole


def test_what_cannot_be_compiled_is_said_before_anything_is_encoded(recipe, train, tmp_path, monkeypatch, capsys):
    import torch

    def broken(*_, **__):
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    assert train(recipe, tmp_path / "run", "--set", "train.compile=true") == 2
    assert "train.compile: torch cannot compile here: No working C++ compiler found" in capsys.readouterr().err
    assert train(recipe, tmp_path / "run", "--set", "train.compile=true", "--set", "method={kind: vae_decoder}") == 2
    assert "leave it out" in capsys.readouterr().err
