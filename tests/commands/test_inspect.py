import argparse
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from finetune import registry
from finetune.artifact import Artifact, read_tensors, write_safetensors
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
    facts = json.loads(inspected(capsys, adapter, "--json", "--header"))
    assert facts["kind"] == "lora" and facts["format"] == "kohya" and facts["family"] == "sd1"
    assert facts["ranks"] == [2] and facts["alphas"] == [1] and facts["modules"] == {"denoiser": 1, "text": 1}
    assert facts["tensors"] == 6 and facts["parameters"] == 30 and facts["dtypes"] == {"F32": 6}
    assert facts["bytes"] == adapter.stat().st_size and len(facts["metadata"]["long"]) == 5000
    assert "norms" not in facts


def test_the_table_fits_80_columns_and_cannot_steer_the_terminal(adapter, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = inspected(capsys, adapter)
    assert max(len(line) for line in text.splitlines() if str(adapter) not in line) <= 80
    assert "\x1b" not in text and "5,000 characters" in text
    assert "modules   1 in denoiser, 1 in text" in text and "    method: lora" in text
    assert text.count("█") >= 40 and "problem" not in text


def test_norms_are_those_of_the_change(adapter, capsys):
    facts = json.loads(inspected(capsys, adapter, "--json"))
    change = pytest.approx(12 ** 0.5)  # 4x3 entries of alpha/r · 2 = 1
    assert facts["norms"] == {"denoiser.down_blocks.0": change, "text.text_model.encoder.layers.0": change}
    assert facts["layers"] == {TO_K: change, FC1: change} and facts["problems"] == []


def saved(path, kind, *modules):
    tensors = {f"denoiser.mid_block.attentions.0.transformer_blocks.{i}.attn2.to_q.{role}": tensor
               for i, module in enumerate(modules) for role, tensor in module.items()}
    base.save(Artifact(kind, "sd1", tensors, {}), path, "kohya", SPEC)
    return path


def test_problems_are_found(tmp_path, capsys, adapter):
    def lora(value):
        return {"lora_A": torch.ones(2, 3), "lora_B": torch.full((4, 2), value), "alpha": torch.tensor(2.0)}

    path = saved(tmp_path / "x.safetensors", "lora", lora(0.01), lora(0.0), lora(torch.nan), lora(0.1), lora(0.01))
    tensors = read_tensors(path)
    tensors["lora_unet_mid_block_attentions_0_transformer_blocks_3_attn2_to_q.alpha"] = torch.tensor(200.0)
    write_safetensors(path, tensors, {"finetune.family": "sd1"})
    problems = json.loads(inspected(capsys, path, "--json"))["problems"]
    assert len(problems) == 4 and problems[0].startswith("odd alpha: 200")
    assert "blocks.1.attn2" in str([p for p in problems if "nothing" in p])
    assert "blocks.2.attn2" in str([p for p in problems if "NaN" in p])
    assert "blocks.3.attn2" in str([p for p in problems if "bear" in p])
    # One half of a pair is gone: said, and the header is shown all the same.
    tensors = read_tensors(adapter)
    write_safetensors(tmp_path / "half", {k: t for k, t in tensors.items() if not k.endswith("to_k.lora_up.weight")}, {})
    text = inspected(capsys, tmp_path / "half")
    assert "problem" in text and ("lacks" in text or "unknown family" in text) and "kind      lora" in text


def test_other_kinds_are_measured_and_those_that_depend_on_the_base_are_not(tmp_path, capsys):
    lokr = {"lokr_w1": torch.full((2, 2), 0.5), "lokr_w2": torch.full((2, 3), 0.1), "alpha": torch.tensor(1.0)}
    facts = json.loads(inspected(capsys, saved(tmp_path / "lokr.safetensors", "lokr", lokr), "--json"))
    assert list(facts["norms"].values()) == [pytest.approx(6 ** 0.5 * 0.1)]      # ‖w1‖ · ‖w2‖, of ‖w1‖ = 1
    dora = {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(4, 2), "alpha": torch.tensor(1.0), "dora_scale": torch.ones(1, 3)}
    path = saved(tmp_path / "dora.safetensors", "dora", dora)
    assert "norms" not in json.loads(inspected(capsys, path, "--json"))
    with pytest.raises(FinetuneError, match="no norms to draw: kind dora"):
        inspected(capsys, path, "--plot", tmp_path / "x.png")


def test_the_plot_shows_each_block(adapter, tmp_path, capsys):
    inspected(capsys, adapter, "--plot", tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        colours = [colour for _, colour in sorted(image.convert("RGB").getcolors(1 << 20), reverse=True)]
        assert image.format == "PNG" and image.height == 48 + 2 * 24 + 40
    assert colours[1] == (158, 197, 232) and (31, 78, 121) in colours       # the bars, the dots


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
