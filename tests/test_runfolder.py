import json
import os
import shutil
import socket
from collections import namedtuple
from pathlib import Path

import pytest

from finetune import runfolder
from finetune.disk import write_json, write_text
from finetune.errors import FinetuneError
from finetune.runfolder import RunFolder


def test_everything_lies_inside_under_the_recipes_name(tmp_path):
    folder = RunFolder(tmp_path / "elsewhere", "dog")
    assert folder.checkpoint(250) == tmp_path / "elsewhere" / "checkpoints" / "step-00000250"
    assert folder.preview(250).name == "step-00000250.png"
    assert folder.adapter("kohya", first=True) == tmp_path / "elsewhere" / "adapter" / "dog.safetensors"
    assert folder.adapter("diffusers", first=False).name == "dog.diffusers.safetensors"
    assert all(p.is_relative_to(folder.root)
               for p in (folder.recipe, folder.resolved, folder.identity, folder.metrics, folder.log))


def test_it_is_made_and_made_again(tmp_path):
    for said in ("one", "two"):     # two runs of the same command
        folder = RunFolder(tmp_path / "a" / "b", "x")
        folder.say(said)
        folder.create(0)
        (folder.checkpoints / said).write_text("")
    folder.say("three")
    assert folder.log.read_text() == "one\ntwo\nthree\n"
    assert sorted(p.name for p in folder.root.iterdir() if p.is_dir()) == ["adapter", "checkpoints", "previews"]
    assert (folder.checkpoints / "one").exists() and not folder.begun()
    write_json(folder.identity, {})
    assert folder.begun()


def test_a_start_clears_what_kills_left_and_nothing_that_is_being_written(tmp_path):
    folder = RunFolder(tmp_path / "run", "x")
    folder.create(0)
    staged = [folder.previews / f".a.png.{pid}.part" for pid in (2**22 + 1, 10**30, os.getpid(), os.getppid())]
    for file in staged:
        file.write_text("")
    (folder.checkpoints / ".step-00000001.part").mkdir()
    RunFolder(tmp_path / "run", "x").create(0)
    assert list(folder.root.rglob("*.part")) == staged[-1:]


@pytest.mark.parametrize("free, enough", [(1_000_000, True), (999_999, False), (0, False)])
def test_a_disk_without_room_is_told_before_the_run(tmp_path, monkeypatch, free, enough):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - free, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    folder = RunFolder(tmp_path / "run", "x")
    if enough:
        folder.create(1_000_000)
    else:
        with pytest.raises(FinetuneError, match=f"{folder.root} has {free / 1e6:,.0f} MB free.*1 MB.*--run"):
            folder.create(1_000_000)


def test_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    def refuse(path, data):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)      # root may write anywhere
    with pytest.raises(FinetuneError, match="cannot be written: Permission denied.*--run"):
        RunFolder(tmp_path / "run", "x").create(0)


def test_who_holds_it_is_alive(tmp_path):
    held, looks = RunFolder(tmp_path / "run", "x"), RunFolder(tmp_path / "run", "x")
    held.lock()
    assert looks.owner()["pid"] == os.getpid()
    owner = tmp_path / ".run.owner"
    whole = owner.read_text()
    others = [whole.replace(str(os.getpid()), other) for other in (str(2**22 + 1), "1e400", "[]")]
    for said in (*others, '{"host": ' * 10**5, "{"):
        owner.write_text(said)      # what a dead run left, while another process looks too
        assert looks.owner() is None


def test_a_run_on_a_read_only_disk_is_seen(tmp_path, monkeypatch):
    RunFolder(tmp_path / "run", "x").lock()

    def refuse(lock, **_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(runfolder.FileLock, "acquire", refuse)
    assert RunFolder(tmp_path / "run", "x").owner()["pid"] == os.getpid()
    owner = tmp_path / ".run.owner"
    owner.write_text(owner.read_text().replace(socket.gethostname(), "elsewhere"))
    assert RunFolder(tmp_path / "run", "x").owner() is None


@pytest.mark.parametrize("line", [
    "[]", "5", "[" * 10**5, '{"loss": 1}', '{"step": "1"}', '{"step": 1, "loss": 1}', '{"step": 1, "loss": "low"}',
    '{"step": 1, "clip_i": [1]}', '{"step": 1' + "0" * 400 + "}", '{"step": 1, "loss": 1, "images_per_second": null}'])
def test_a_line_that_no_run_has_written_is_damage(tmp_path, line):
    folder = RunFolder(tmp_path, "x")
    sound = [{"step": 1, "loss": None, "images_per_second": 2.5, "memory_mb": 100},
             {"step": 2, "skipped": ["a"], "why": "loss"}]
    folder.metrics.write_text("".join(json.dumps(one) + "\n" for one in sound) + '{"step": 3, "lo')
    assert folder.logged() == sound
    folder.metrics.write_text(f"{line}\n")
    with pytest.raises(FinetuneError, match="metrics.jsonl is damaged: .*training on mends it"):
        folder.logged()


@pytest.mark.parametrize("change, place", [
    ({"exact": {}}, "at exact.recipe"), ({"exact": [1]}, "at exact"), ({"rounding": {"torch": [1]}}, "at rounding.torch"),
    ({}, "")])
def test_an_identity_that_was_edited_is_damage(tmp_path, change, place):
    folder, train = RunFolder(tmp_path, "x"), {"max_steps": 1, "batch_size": 1, "gradient_accumulation": 1, "seed": 0}
    whole = {"exact": {"recipe": {"train": train, "data": {}}, "data": "", "base": {}, "processes": 1, "device": "cpu"},
             "rounding": {"torch": "2", "threads": 1}}
    write_json(folder.identity, whole)
    assert folder.known() == whole
    folder.identity.write_text(json.dumps(whole | change) if change else "{" * 10**5)
    with pytest.raises(FinetuneError, match=f"run.json is damaged *{place}.*--fresh"):
        folder.known()


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_file_in_the_way_is_told(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FinetuneError, match="cannot be written"):
        RunFolder(tmp_path / place, "x").create(0)
    assert (tmp_path / "file").read_text() == "mine"


def test_setting_aside_takes_the_first_free_number_and_loses_nothing(tmp_path):
    for number in (1, 2, 3):
        folder = RunFolder(tmp_path / "run", "x")
        folder.create(0)
        folder.recipe.write_text(str(number))
        assert folder.set_aside() == tmp_path / f"run.old-{number}" and not folder.root.exists()
    assert [(tmp_path / f"run.old-{n}" / "recipe.yaml").read_text() for n in (1, 2, 3)] == ["1", "2", "3"]
    shutil.rmtree(tmp_path / "run.old-2")
    folder = RunFolder(tmp_path / "run", "x")
    folder.create(0)
    assert folder.set_aside().name == "run.old-2"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch, failing):
    write_text(tmp_path / "x", "old")
    with monkeypatch.context() as patch:
        patch.setattr(runfolder.os, failing, lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"
    write_text(tmp_path / "x", "new ü")
    assert (tmp_path / "x").read_text(encoding="utf-8") == "new ü" and os.listdir(tmp_path) == ["x"]


def test_json_is_the_same_for_equal_values(tmp_path):
    write_json(tmp_path / "a", {"b": 1, "a": "ü"})
    write_json(tmp_path / "b", {"a": "ü", "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json.loads((tmp_path / "a").read_text(encoding="utf-8")) == {"a": "ü", "b": 1}


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    first = RunFolder(tmp_path / "run", "x")
    first.lock()
    with pytest.raises(FinetuneError, match=f"{tmp_path / 'run'} is in use by process {os.getpid()} on .*--run"):
        RunFolder(tmp_path / "run", "x").lock()
    RunFolder(tmp_path / "beside", "x").lock()
    first.create(0)
    first.set_aside()       # the place stays this run's
    with pytest.raises(FinetuneError, match="in use"):
        RunFolder(tmp_path / "run", "x").lock()
    del first               # however the process ends
    RunFolder(tmp_path / "run", "x").lock()
