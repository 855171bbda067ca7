"""What the live page does, without a browser; `scripts/browser.py` opens it in one."""

import asyncio
import json
import sys

import numpy as np
import pytest
from PIL import Image

from finetune.cli import main
from finetune.commands.ui import SameOrigin
from finetune.runfolder import RunFolder


def test_without_gradio(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["ui"]) == 2
    assert "pip install 'finetune[ui]'" in capsys.readouterr().err


@pytest.mark.parametrize("headers, status", [
    ({"host": "127.0.0.1:7860"}, 200), ({"host": "localhost:7860", "origin": "http://localhost:7860"}, 200),
    ({"host": "127.0.0.1:7860", "sec-fetch-site": "same-origin"}, 200), ({}, 403), ({"host": "evil.example:7860"}, 403),
    ({"host": "127.0.0.1:7860", "origin": "http://evil.example"}, 403), ({"host": "127.0.0.1:7860", "origin": "null"}, 403),
    ({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:80"}, 403),
    ({"host": "127.0.0.1:7860", "sec-fetch-site": "cross-site"}, 403)])
def test_only_the_page_itself_is_answered(headers, status):
    pytest.importorskip("starlette")
    from starlette.responses import PlainTextResponse

    said = []

    async def send(message):
        said.append(message)

    scope = {"type": "http", "method": "GET", "headers": [(key.encode(), value.encode()) for key, value in headers.items()]}
    asyncio.run(SameOrigin(PlainTextResponse("page"))(scope, None, send))
    assert said[0]["status"] == status


def test_it_samples_as_the_command_does_and_shows_runs_as_they_are(recipe, tmp_path, train, monkeypatch):
    pytest.importorskip("gradio")
    from finetune.commands import _page

    monkeypatch.chdir(tmp_path)
    run, damaged = tmp_path / "runs" / "<b>run", tmp_path / "runs" / "damaged"
    assert train(recipe, run.relative_to(tmp_path), "--set", "train.max_steps=2", "--set", "export=[kohya]") == 0
    damaged.mkdir()
    (damaged / "run.json").write_text("{")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')      # written just now

    _, adapters, bases = _page.choices()
    [adapter] = adapters["choices"][1:]
    words = ("a red circle", "blue", 7, 2, 3.0)
    base = _page.run_of(adapter[0])
    shown = _page.paint(_page.Base(), base, adapter[0], "", 0.5, 1, *words)
    assert main(["sample", "--base", "tiny", "--adapter", f"{adapter[0]}:0.5", "--strengths", "0,1", "--prompt", words[0],
                 "--negative", words[1], "--seed", "7", "--steps", "2", "--guidance", "3", "--batch", "1", "--out", "out"]) == 0
    for update, factor in zip(shown, ("0", "1")):
        assert np.array_equal(update["value"], Image.open(tmp_path / "out" / f"0000-seed7-strength{factor}.png"))
    assert shown[2]["visible"] is False and base in [value for _, value in bases["choices"]]

    table, chosen, curves, *_, seen = _page.refresh([], 0, {})
    assert "&lt;b&gt;run" in table and "<b>run" not in table + curves and "damaged" in table
    assert "no run" not in curves and chosen["choices"]
    again = _page.refresh(chosen["value"], 0, seen)
    assert all("value" not in new and "choices" not in new for new in again[:-1]), "nothing is new"

    last = RunFolder(run, run.name).last_owner()
    assert last["words"] == [str(recipe), "--set=train.max_steps=2", "--set=export=[kohya]", "--run=runs/<b>run"]
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["step"] == 2
