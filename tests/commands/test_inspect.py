import argparse
import json
import subprocess
import sys

import pytest
import torch

from finetune import registry
from finetune.artifact import Artifact, write_safetensors
from finetune.commands import inspect
from finetune.errors import FinetuneError
from finetune.formats import base

SPEC = registry.find("families", "sd1").SPEC
TO_K = "denoiser.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
FC1 = "text.text_model.encoder.layers.0.mlp.fc1"


@pytest.fixture
def adapter(tmp_path):
    tensors = {}
    for stem in (TO_K, FC1):
        tensors |= {f"{stem}.lora_A": torch.ones(2, 3), f"{stem}.lora_B": torch.ones(4, 2)}
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    metadata = {"finetune.recipe": "base: tiny\nmethod: lora\n", "evil": "\x1b[2J", "long": "x" * 5000}
    path = tmp_path / "ink.safetensors"
    base.save(Artifact("lora", "sd1", tensors, metadata), path, "kohya", SPEC)
    return path


def inspected(capsys, *words):
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    assert inspect.run(parser.parse_args([str(word) for word in words])) == 0
    return capsys.readouterr().out


def test_json_has_everything(adapter, capsys):
    facts = json.loads(inspected(capsys, adapter, "--json"))
    assert facts["kind"] == "lora" and facts["format"] == "kohya" and facts["family"] == "sd1"
    assert facts["ranks"] == [2] and facts["alphas"] == [1] and facts["modules"] == {"denoiser": 1, "text": 1}
    assert facts["tensors"] == 6 and facts["parameters"] == 30 and facts["dtypes"] == {"F32": 6}
    assert facts["bytes"] == adapter.stat().st_size and len(facts["metadata"]["long"]) == 5000
    assert "norms" not in facts


def test_the_table_fits_80_columns_and_cannot_steer_the_terminal(adapter, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = inspected(capsys, adapter, "--norms")
    assert max(len(line) for line in text.splitlines() if str(adapter) not in line) <= 80
    assert "\x1b" not in text and "5,000 characters" in text
    assert "modules   1 in denoiser, 1 in text" in text and "    method: lora" in text


def test_norms_are_those_of_the_change(adapter, capsys):
    norms = json.loads(inspected(capsys, adapter, "--json", "--norms"))["norms"]
    change = pytest.approx(12 ** 0.5)  # 4x3 entries of alpha/r · 2 = 1
    assert norms == {"denoiser.down_blocks.0": change, "text.text_model.encoder.layers.0": change}


def test_norms_need_a_family(tmp_path):
    write_safetensors(tmp_path / "x", {"anything": torch.zeros(2)}, {})
    with pytest.raises(FinetuneError, match="unknown family"):
        inspect.norms(tmp_path / "x", None)


def test_a_file_that_is_nothing_known(tmp_path, capsys):
    write_safetensors(tmp_path / "x", {"anything": torch.zeros(2)}, {})
    text = inspected(capsys, tmp_path / "x")
    assert "kind      unknown" in text and "no metadata" in text


def test_senseless_metadata_are_told_with_the_file(tmp_path):
    write_safetensors(tmp_path / "x", {}, {"lora_adapter_metadata": "{"})
    with pytest.raises(FinetuneError, match="x: its lora_adapter_metadata"):
        inspect.describe(tmp_path / "x")


def test_torch_is_not_imported_for_a_look(adapter):
    code = "import pathlib, sys; from finetune.commands.inspect import describe"
    code += "; describe(pathlib.Path(sys.argv[1])); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(adapter)], check=True)


def test_keys_are_listed_when_asked_for(tmp_path, capsys):
    from finetune.cli import main

    write_safetensors(tmp_path / "x.safetensors", {"lora_unet_mid.alpha": torch.tensor(2.0)}, {})
    assert main(["inspect", str(tmp_path / "x.safetensors"), "--keys"]) == 0
    assert "lora_unet_mid.alpha  F32 []" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 0
    assert "lora_unet_mid" not in capsys.readouterr().out
