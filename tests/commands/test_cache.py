import json
import os
from types import SimpleNamespace

import pytest
import torch

from finetune.cli import main
from finetune.data import cache, memory
from finetune.families import base as families
from finetune.families import _unet, sd1
from finetune.train import ground

N = 7       # pictures in the fixture, all of the recipe mirrored too


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The encoders that were called."""
    made = []
    for name in ("moments", "encode_text"):
        real = getattr(_unet.UNetFamily, name)
        monkeypatch.setattr(_unet.UNetFamily, name, lambda self, x, name=name, real=real: made.append(name) or real(self, x))
    return made


def test_a_run_after_it_encodes_nothing_and_ends_with_the_same_bytes(recipe, train, tmp_path, calls, capsys):
    assert train(recipe, tmp_path / "run") == 0
    adapter = (tmp_path / "run" / "adapter" / "small.safetensors").read_bytes()
    memory.collect(cache.home(), 0)
    calls.clear()
    assert main(["cache", str(recipe)]) == 0
    assert (calls.count("moments"), calls.count("encode_text")) == (2 * N, N + 1)
    said = capsys.readouterr().out
    assert str(cache.home().parent) in said and f"moments   {2 * N} entries" in said and f"text      {N + 1} entries" in said
    calls.clear()
    assert main(["cache", str(recipe)]) == 0 and not calls
    assert main(["cache", str(recipe), "--set", "data.resolution=16"]) == 0 and calls == ["moments"] * 2 * N
    calls.clear()
    assert train(recipe, tmp_path / "cached") == 0
    assert not [name for name in calls if name == "moments"]
    assert (tmp_path / "cached" / "adapter" / "small.safetensors").read_bytes() == adapter


def test_status_and_gc(recipe, capsys):
    assert main(["cache", "--status"]) == 0
    assert capsys.readouterr().out == f"cache     {cache.home().parent}\n"
    assert main(["cache", str(recipe)]) == 0
    assert main(["cache", "--gc"]) == 0
    assert "freed     0.0 MB" in capsys.readouterr().out and cache.contents(cache.home())
    assert main(["cache", "--status"]) == 0 and "index     " in capsys.readouterr().out
    for file in cache.home().parent.rglob("*"):
        os.utime(file, (0, 0))
    assert main(["cache", "--gc", "--older-than", "7"]) == 0
    assert "that were not used for 7 days" in capsys.readouterr().out and not list(cache.home().iterdir())
    assert not [file for file in cache.home().parent.rglob("*") if file.is_file()]


@pytest.mark.parametrize("arguments", [[], ["x.yaml", "--gc"], ["--gc", "--older-than", "-1"],
                                       ["--gc", "--older-than", "nan"]])
def test_orders_that_make_no_sense(arguments, capsys):
    assert main(["cache", *arguments]) == 2


def test_a_folder_that_cannot_be_written_is_an_error_here(recipe, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    assert main(["cache", str(recipe)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_problem_of_the_recipe_is_placed(recipe, capsys):
    assert main(["cache", str(recipe), "--set", "data.images=nowhere"]) == 2
    assert "--set data.images=nowhere  data.images: there is no folder" in capsys.readouterr().err


def encoders(family) -> tuple[str, str]:
    weights = {name: families.fingerprint({name: part}) for name, part in family.parts.items()}
    return ground.encoders(SimpleNamespace(family=family, weights=weights), "cpu")


def test_what_tells_encoders_apart():
    family = sd1.load("tiny")
    vae, text = encoders(family)
    family.encode_text(["a red circle"])                    # leaves its padding in the tokenizer
    assert encoders(family) == encoders(sd1.load("tiny")) == (vae, text)
    other = sd1.load("tiny", torch.bfloat16)
    assert encoders(other)[0] != vae and encoders(other)[1] != text

    family.parts["denoiser"].conv_in.weight.zero_()
    assert encoders(family) == (vae, text)
    with torch.no_grad():
        family.parts["vae"].encoder.conv_in.weight[0] += 1e-3
    assert encoders(family)[0] != vae and encoders(family)[1] == text
    family.parts["text"].config.hidden_act = "gelu"         # the same weights, and another encoder
    assert encoders(family)[1] != text
    family = sd1.load("tiny")
    rules = json.loads(family.tokenizers["text"].backend_tokenizer.to_str())
    rules["normalizer"] = None
    family.tokenizers["text"]._tokenizer = type(family.tokenizers["text"].backend_tokenizer).from_str(json.dumps(rules))
    assert encoders(family) == (vae, encoders(family)[1]) and encoders(family)[1] != text
