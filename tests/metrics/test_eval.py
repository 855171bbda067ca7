"""`finetune eval` on the tiny base: what is equal is said to be, what differs is, and what cannot be done is refused."""

import json

import pytest
import torch
from PIL import Image

from finetune import registry
from finetune.artifact import Artifact
from finetune.cli import main
from finetune.formats import base as formats

PATH = "denoiser.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.fixture
def adapters(tmp_path):
    """Two that differ, under one name, and a run folder whose adapter changes nothing."""
    g = torch.Generator().manual_seed(0)
    found = []
    for folder, size in (("one", 3.0), ("two", 1.0), ("zero/adapter", 0.0)):
        tensors = {f"{PATH}.lora_A": torch.randn(2, 128, generator=g),
                   f"{PATH}.lora_B": size * torch.randn(64, 2, generator=g), f"{PATH}.alpha": torch.tensor(1.0)}
        (tmp_path / folder).mkdir(parents=True)
        found.append(tmp_path / folder / "a.safetensors")
        formats.save(Artifact("lora", "sd1", tensors, {}), found[-1], "kohya", registry.find("families", "sd1").SPEC)
    return [str(found[0]), str(found[1]), str(tmp_path / "zero")]


@pytest.fixture
def words(tmp_path, pictures):
    (tmp_path / "prompts.txt").write_text("a red circle on white\na blue star on black\n")
    (tmp_path / "plain.txt").write_text("a green square on white\n")
    return ["--base", "tiny", "--prompts", str(tmp_path / "prompts.txt"), "--plain", str(tmp_path / "plain.txt"),
            "--seeds", "2", "--steps", "1", "--size", "32x32", "--images", str(pictures), "--quiet"]


def test_an_eval(adapters, words, clip, tmp_path, capsys):
    named = [f"--metric={name}:{clip}" for name in ("clip_t", "clip_i", "diversity", "copying", "drift")]
    assert main(["eval", *adapters, *words, *named, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80 or str(tmp_path) in said.splitlines()[-1]
    assert "a-2 − a " in said and "zero − base " in said

    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert str(tmp_path) not in json.dumps({key: value for key, value in found.items() if key not in ("metrics", "nearest")})
    assert set(found["metrics"]) == {"clip_t", "clip_i", "diversity", "copies", "nearest", "drift"} and found["pictures"] == 4
    for measure, about in found["metrics"].items():
        assert set(about["of"]) == {"base", "a", "a-2", "zero"} - ({"base"} if measure == "drift" else set())
        assert all(one["low"] is None or one["low"] <= one["value"] <= one["high"] for one in about["of"].values())
        if measure == "drift":
            assert about["of"]["zero"] == {"value": 0, "low": 0, "high": 0} and about["of"]["a"]["value"] > 0
        else:
            assert about["differences"]["zero − base"]["value"] == 0
    assert found["metrics"]["clip_i"]["differences"]["a − base"]["value"] != 0
    assert Image.open(tmp_path / "out" / "sheet.png").width > 4 * 128
    assert {one["of"] for one in found["nearest"]} == {"base", "a", "a-2", "zero"}
    assert (tmp_path / "out" / "nearest.png").exists()
    decoded = {name: [Image.open(p).tobytes() for p in sorted((tmp_path / "out" / name).glob("*.png"))]
               for name in ("base", "zero")}
    assert decoded["base"] == decoded["zero"] and len(decoded["base"]) == 4

    assert main(["eval", *adapters, *words, *named, "--out", str(tmp_path / "out")]) == 2
    assert "there already, and not replaced" in capsys.readouterr().err


def test_one_without_a_network_as_json(adapters, words, tmp_path, capsys):
    adapter, out = adapters[0] + ":0.5", str(tmp_path / "out")
    assert main(["eval", adapter, *words, "--metric", "drift:pixels", "--json", "--out", out]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["subjects"] == {"base": {}, "a-strength0.5": {"a.safetensors": 0.5}}
    assert found["metrics"]["drift"]["of"]["a-strength0.5"]["value"] > 0


@pytest.mark.parametrize("more, said", [
    (["--metric", "clipt"], "unknown metric 'clipt'; did you mean 'clip_t'?"),
    (["--metric", "kid:pixels"], "--metric kid:pixels: it compares whole sets: at least 50"),
    (["--metric", "diversity:pixels", "--seeds", "1"], "give --seeds 2 or more"),
    (["--metric", "attributes"], "it has no usual model"),
    (["--metric", "clip_t:pixels"], "pixels: they know no words"),
    (["--metric", "drift:pixels", "--metric", "drift:nowhere"], "--metric drift: named twice"),
    (["--metric", "dino:no/such/network"], "no/such/network: cannot be used"),
    (["--images", "nowhere"], "--images: "), (["--seeds", "0"], "at least 1")])
def test_what_cannot_be_done(more, said, adapters, words, tmp_path, capsys):
    assert main(["eval", adapters[2], *words, *more, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_without_an_adapter(words, tmp_path, capsys):
    assert main(["eval", str(tmp_path), *words, "--out", str(tmp_path / "out")]) == 2
    assert "holds no adapter/*.safetensors" in capsys.readouterr().err
