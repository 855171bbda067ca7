"""`finetune status` and `finetune stop` on a real run in another process."""

import json
import os
import subprocess
import sys
import time

from finetune.cli import main
from finetune.runfolder import RunFolder


def test_a_run_is_seen_stopped_and_finished(recipe, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "finetune", "train", str(recipe), "--run", str(run)]
    long = [*command, "--set", "train.max_steps=2000"]
    said = tmp_path / "stderr"      # a pipe that nobody reads would fill up with the bar and hold the run
    process = subprocess.Popen(long, stderr=said.open("w"), env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while not (run / "metrics.jsonl").exists():
            assert process.poll() is None, said.read_text()
            time.sleep(0.2)
        assert main(["status", str(run), "--json"]) == 0
        row = json.loads(capsys.readouterr().out)[0]
        assert row["state"] == "running" and row["pid"] == process.pid and row["max_steps"] == 2000
        assert main(["stop", str(run)]) == 0
        assert process.wait(20) == 143
    finally:
        process.kill()
    assert main(["stop", str(run)]) == 2
    assert main(["status", str(run)]) == 0
    assert "stopped" in capsys.readouterr().out
    assert RunFolder(run, "small").owner() is None
    assert [p.name for p in (run / "checkpoints").iterdir()]


def test_no_runs_and_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 0
    assert main(["status", "nowhere"]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_a_damaged_run_is_named_and_the_others_are_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = {"max_steps": 4, "batch_size": 1, "gradient_accumulation": 1}
    exact = {"recipe": {"train": train}, "processes": 1, "data": "", "base": {}, "device": "cpu"}
    sound = json.dumps({"exact": exact, "rounding": {}})
    for name, said in {"a": "{", "b": sound, "c": '{"exact": {}, "rounding": {}}'}.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text(said)
    assert main(["status"]) == 0
    a, b, c = capsys.readouterr().out.splitlines()
    assert a.startswith("runs/a") and "runs/a/run.json is damaged" in a
    assert b.split() == ["runs/b", "stopped", "0/4"]
    assert "runs/c/run.json is damaged at exact.recipe: Field required" in c
    assert main(["status", "--json"]) == 0
    assert [row["state"] for row in json.loads(capsys.readouterr().out)] == ["damaged", "stopped", "damaged"]
    assert main(["status", "runs/a"]) == 2
    assert "run.json is damaged" in capsys.readouterr().err
