"""A run as a repository of the hub: whole, proven, and nothing private; no test touches a network."""

import json
import re
import shutil

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from finetune.cli import main
from finetune.families._source import TINY
from finetune.recipe import load
from finetune.train.card import hub_id

TOKEN = "hf_" + "a1B2" * 8
HOSTILE = "```\n# I am a heading <script>"


@pytest.fixture
def run(recipe, pictures, train, tmp_path):
    folder = tmp_path / "private place" / "trained"
    folder.parent.mkdir()
    shutil.copytree(TINY, folder.parent / "base")
    words = [f"base.path='{folder.parent}/base'", "train.max_steps=1", "train.warmup_steps=0", "every.log=1",
             "every.preview=1", "preview.steps=1", f"preview.prompts=[{json.dumps(HOSTILE)}]",
             "data.caption.trigger='sks `x`'", "export=[kohya, diffusers]"]
    assert train(recipe, folder, *(word for each in words for word in ("--set", each))) == 0
    return folder


def push(run, *more: str) -> int:
    return main(["push", str(run), "--to", "me/it", "--licence", "cc-by-4.0", *more])


def test_a_push(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    of = {"base": {"value": 0.25, "low": 0.2, "high": 0.3}}
    judged = {"metrics": {"clip_t": {"better": "higher", "of": of, "differences": {}}}}
    (run / "judged").mkdir()
    (run / "judged" / "eval.json").write_text(json.dumps(judged))
    monkeypatch.setattr(huggingface_hub, "create_repo", None)        # would be called in vain
    assert push(run, "--dry-run", str(out)) == 0
    assert {file.name for file in out.iterdir()} == {"README.md", "preview.png", "verify.json", "small.safetensors",
                                                     "small.diffusers.safetensors"}
    assert (out / "small.safetensors").read_bytes() == (run / "adapter" / "small.safetensors").read_bytes()
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "cc-by-4.0" and card.data.base_model is None and card.data.instance_prompt == "sks `x`"
    assert str(tmp_path) not in card.content and "private place" not in card.content and "path: base" in card.content
    for part in ("`` sks `x` ``", "](preview.png)", 'pipe.load_lora_weights("me/it", weight_name="small.safetensors")',
                 "**ComfyUI**", "0.2500", "loss: ", "diffusers at strength 1"):
        assert part in card.content, part
    (tmp_path / "again.yaml").write_text(re.search(r"^(`+)yaml\n(.*?)^\1$", card.text, re.M | re.S)[2])
    assert load(tmp_path / "again.yaml").recipe.method == load(run / "resolved.yaml").recipe.method
    assert not [row for row in card.text.splitlines() if row.startswith("# ") and row != "# it"]
    assert push(run, "--dry-run", str(out)) == 2 and "is not empty" in capsys.readouterr().err

    sent = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda to, exist_ok: None)
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda repo_id, folder_path, commit_message: sent.append(
        (repo_id, {file.name: file.read_bytes() for file in folder_path.iterdir()})))
    assert push(run) == 0 and "https://huggingface.co/me/it" in capsys.readouterr().out
    assert sent == [("me/it", {file.name: file.read_bytes() for file in out.iterdir()})]

    def refuse(error):
        def call(*_, **__):
            raise error
        monkeypatch.setattr(huggingface_hub, "create_repo", call)
        assert push(run) == 2
        return capsys.readouterr().err

    assert "hf auth login" in refuse(LocalTokenNotFoundError("none"))
    response = type("Response", (), {"headers": {}, "request": None, "status_code": 401})()
    said = refuse(HfHubHTTPError(f"401: {TOKEN} is not allowed", response=response))
    assert "cannot be pushed: 401" in said and TOKEN not in said
    for name in ("it", "a/b/c", "a b/c"):
        assert main(["push", str(run), "--to", name, "--licence", "mit"]) == 2 and f"--to {name}" in capsys.readouterr().err

    proof = json.loads((run / "adapter" / "verify.json").read_text())
    proof["small.safetensors"][0]["passed"] = False
    (run / "adapter" / "verify.json").write_text(json.dumps(proof))
    assert push(run) == 2 and "only what is proven is pushed" in capsys.readouterr().err
    for edited, place in ({"../recipe.yaml": []}, "../recipe.yaml"), ({"small.safetensors": [{}]}, "small.safetensors.0.name"):
        (run / "adapter" / "verify.json").write_text(json.dumps(edited))       # nothing from elsewhere is copied out
        for command in (push, lambda run: main(["report", str(run)])):
            assert command(run) == 2 and f"verify.json is damaged at {place}" in capsys.readouterr().err
    (run / "adapter" / "verify.json").unlink()
    assert push(run) == 2 and "is no run that is done" in capsys.readouterr().err


def test_what_is_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert hub_id("stabilityai/stable-diffusion-2-1") == "stabilityai/stable-diffusion-2-1"
    assert [hub_id(path) for path in ("models/mine", "/home/me/base", "../base", "~/base", "tiny")] == [None] * 5
