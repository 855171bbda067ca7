"""Each mistake of a user: exit code 2, a message with place and way out, no traceback, nothing left behind."""

import json
import shutil
from collections import namedtuple

import pytest

from finetune.families._source import TINY


def settings(**values) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


@pytest.fixture
def refused(recipe, train, tmp_path, capsys):
    def check(*said: str, **values) -> None:
        assert train(recipe, tmp_path / "run", *settings(**values)) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        for words in said:
            assert words in message
        assert not (tmp_path / "run").exists()

    return check


def test_no_folder_of_pictures(refused, tmp_path):
    refused(f"--set data.images={tmp_path}/nowhere  data.images: there is no folder", data__images=tmp_path / "nowhere")


def test_an_empty_folder_of_pictures(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused("holds no pictures", data__images=tmp_path / "empty")


def test_all_bad_pictures_and_captions_at_once(refused, pictures, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(pictures, bad)
    (bad / "0.png").write_bytes((bad / "0.png").read_bytes()[:-30])
    (bad / "new.jpg").write_bytes(b"<html>not a picture</html>")
    for name in ("bare", "novel"):
        shutil.copy(bad / "1.png", bad / f"{name}.png")
    (bad / "novel.txt").write_text("a red circle, " * 10**5)
    refused("0.png: not a readable picture", "new.jpg: not a readable picture", "bare.png: no caption",
            "novel.png: the text beside it has 1,399,999 characters, and 50,000 are the most", data__images=bad)


def test_bad_pictures_can_be_left_out(recipe, train, pictures, tmp_path, capsys):
    bad = tmp_path / "bad"
    shutil.copytree(pictures, bad)
    (bad / "0.png").write_bytes((bad / "0.png").read_bytes()[:-30])
    assert train(recipe, tmp_path / "run", "--set", f"data.images={bad}", "--set", "data.unreadable=skip") == 0
    said = (tmp_path / "run" / "log.txt").read_text()
    assert "skipped" in said and "0.png" in said and "6 pictures" in said


def test_a_caption_that_would_be_cut(refused, pictures, tmp_path):
    refused("0.png", "would lose", data__caption__template="'" + "{text} " * 20 + "'")


def test_no_base(refused):
    refused("base.path: there is no folder ./nowhere", base__path="./nowhere")


def test_a_base_that_no_hub_has(refused, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("neither `tiny`, nor a folder here, nor a hub model", base__path="nobody/nothing")


def test_a_base_of_another_family(refused, tmp_path):
    shutil.copytree(TINY, tmp_path / "xl")
    index = json.loads((tmp_path / "xl" / "model_index.json").read_text())
    (tmp_path / "xl" / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLPipeline"}))
    refused("is sdxl", base__path=tmp_path / "xl")


def test_a_target_that_matches_nothing(refused, recipe):
    refused("method.targets: 'to_kk' matches no module of sd1.denoiser", "nearest: 'to_k'",
            "groups: cross_attention, attention, feed_forward, conv, all", method__targets="[cross_attention, to_kk]")


def test_a_target_that_is_no_layer_with_weights(refused):
    refused("none of them a Linear or Conv2d", method__targets="[attn1]")


def test_a_resolution_that_the_vae_cannot_have(refused):
    refused("data.resolution", data__resolution=33)


def test_pictures_smaller_than_a_window(refused):
    refused("objective.ssim: compares windows of 11 pixels, and a picture is fitted to 8", data__resolution=8,
            method="{kind: vae_decoder}", objective="{ssim: 0.5}")


def test_no_room_on_the_disk(recipe, train, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1000))
    assert train(recipe, tmp_path / "run") == 2
    assert "MB free, but the run may need" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_half_precision_without_the_hardware(refused):
    refused("train.mixed_precision: fp16", train__mixed_precision="fp16")
    refused("base.dtype: float16", base__dtype="float16")


def test_a_recipe_that_is_not_there(train, tmp_path, capsys):
    assert train(tmp_path / "smal.yaml", tmp_path / "run") == 2
    assert "no such recipe" in capsys.readouterr().err
