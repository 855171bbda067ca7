"""Whole runs of the variants of LoRA, and what begins with adapters."""

import json

import pytest

from finetune.formats._identify import identify
from finetune.header import read_header

SHAPES = {"lora": {}, "rslora": {}, "dora": {"rank_dropout": 0.2}, "loha": {}, "lokr": {"text": {}}, "oft": {"text": {}}}


def words(variant: str, **more) -> list[str]:
    method = {"kind": "lora", "variant": variant, "targets": ["cross_attention", "conv"], "module_dropout": 0.2,
              "text": {"learning_rate": 1e-3}} | ({} if variant in ("lokr", "oft") else {"rank": 2}) | SHAPES[variant] | more
    return ["--set", f"method={json.dumps(method)}", "--set", "train.max_steps=4", "--set", "train.learning_rate=1e-3"]


@pytest.mark.parametrize("variant", SHAPES)
def test_a_run_is_proven_and_goes_on_bit_for_bit(recipe, train, tmp_path, variant):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(recipe, whole, *words(variant)) == 0
    found = next((whole / "adapter").glob("*.safetensors"))
    checks = [check["name"] for check in json.loads((whole / "adapter" / "verify.json").read_text())[found.name]]
    who = "diffusers at strength" if "lora" in variant else "merged by finetune at"
    assert checks == ["metadata", "finite", "not zero", "fits the base", f"{who} 0.5", f"{who} 1", "tools"]
    assert identify(read_header(found))["modules"]["text"] == 12

    assert train(recipe, cut, *words(variant)) == 0
    for left in (cut / "checkpoints").glob("step-*4"):
        for file in left.iterdir():
            file.unlink()
        left.rmdir()
    next((cut / "adapter").glob("*.safetensors")).unlink()
    assert train(recipe, cut, *words(variant)) == 0
    assert next((cut / "adapter").glob("*.safetensors")).read_bytes() == found.read_bytes()


def test_a_format_that_cannot_hold_it_is_refused_before_the_first_step(recipe, train, tmp_path, capsys):
    assert train(recipe, tmp_path / "run", *words("loha"), "--set", "export=[kohya, diffusers]") == 2
    assert "export: diffusers cannot hold adapters of the kind loha; kohya can" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_training_on_a_base_with_adapters_from_an_adapter(recipe, train, tmp_path):
    for name, variant in (("a", "dora"), ("b", "lora")):
        assert train(recipe, tmp_path / name, *words(variant)) == 0
    files = [str(next((tmp_path / name / "adapter").glob("*.safetensors"))) for name in "ab"]
    merged = ["--set", f"base.adapters={json.dumps([{'path': files[0], 'strength': 0.5}])}"]
    start = ["--set", f"method.start_from={files[1]}"]
    results = {}
    for name, extra in (("plain", []), ("merged", merged), ("started", start), ("both", merged + start)):
        assert train(recipe, tmp_path / name, *words("lora"), *extra) == 0
        results[name] = next((tmp_path / name / "adapter").glob("*.safetensors"))
    assert len({file.read_bytes()[-1000:] for file in results.values()}) == 4
    said = json.loads(read_header(results["both"]).metadata["finetune.recipe"])
    assert said["base"]["adapters"] == [{"path": files[0].rpartition("/")[2], "strength": 0.5}]
    assert said["method"][0]["start_from"] == files[1].rpartition("/")[2] and str(tmp_path) not in json.dumps(said)
