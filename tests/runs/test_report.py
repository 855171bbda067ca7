"""The page about a run: whole, alone, and safe whatever captions and names say."""

import json
from html.parser import HTMLParser

import pytest

from finetune.cli import main
from finetune.train.curves import chart, rounded

HOSTILE = "<script>alert(1)</script> \" onerror='x' {{ 7 * 7 }}"


class Page(HTMLParser):
    """What a browser would load, and run."""

    def __init__(self, text: str):
        super().__init__()
        self.loaded, self.scripts, self.handlers, self.images = [], 0, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.scripts += tag == "script"
        self.handlers += [name for name in attributes if name.startswith("on")]
        self.loaded += [attributes[name] for name in ("src", "href", "action", "data") if name in attributes]
        if tag == "img":
            self.images.append(attributes)


@pytest.fixture
def runs(recipe, pictures, tmp_path, train):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for i in range(3):
        (folder / f"{i}.png").write_bytes((pictures / f"{i}.png").read_bytes())
        rows.append({"file_name": f"{i}.png", "text": f"{HOSTILE} {i}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for name, rate in (("first", "1e-2"), ("second", "2e-2")):
        found.append(tmp_path / name)
        settings = [f"data.images={folder}", "train.max_steps=2", "every.log=1", "every.preview=1", "preview.steps=2",
                    f"preview.prompts=['{HOSTILE[:8]}']", f"train.learning_rate={rate}"]
        assert train(recipe, found[-1], *(word for setting in settings for word in ("--set", setting))) == 0
    return found


def test_a_report(runs, tmp_path, capsys):
    alone = (runs[0] / "report.html").read_text()           # the training made it
    page = Page(alone)
    assert all(address.startswith("data:image/webp") for address in page.loaded)
    assert "http:" not in alone and "https:" not in alone
    assert page.scripts == 1 and not page.handlers
    assert [image["data-step"] for image in page.images if "data-step" in image] == ["0", "1", "2"]
    assert len(page.images) == 3 + 3 and "&lt;script&gt;alert(1)" in alone and "{{ 7 * 7 }}" in alone
    assert "every check passed" in alone and "pipe.load_lora_weights" in alone
    assert str(tmp_path) not in alone

    # A preview that somebody copied, one that a power cut damaged, steps that were all skipped
    for name in ("step-00000002 (copy).png", "step-00000001.png"):
        (runs[1] / "previews" / name).write_bytes(b"")
    lines = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    (runs[1] / "metrics.jsonl").write_text("".join(json.dumps(line | {"loss": None}) + "\n" for line in lines[:1]) +
                                           "".join(json.dumps(line) + "\n" for line in lines[1:]))
    out = tmp_path / "both.html"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    both = out.read_text()
    assert "What differs" in both and "train.learning_rate" in both and "0.02" in both
    assert "train.max_steps</code></td>" not in both
    assert "The same as those of first" in both

    assert main(["report", str(tmp_path)]) == 2
    assert "no run folder" in capsys.readouterr().err
    for picture in (tmp_path / "pictures").iterdir():       # what was learned from is gone: said, and the rest is there
        picture.unlink()
    assert main(["report", str(runs[0])]) == 0
    gone = (runs[0] / "report.html").read_text()
    assert "They cannot be shown: data.images" in gone
    assert len(Page(gone).images) == 3


def test_charts():
    assert chart({"a": []}) == "" and "nan" not in chart({"a": [(1, float("nan")), (2, 1.0), (3, float("inf"))]})
    assert chart({"<b>": [(1, 1.0)]}).count("&lt;b&gt;") == 1
    for low, high in ((0, 1), (0.03, 0.17), (5, 5), (0, 0), (-3, 1e9), (1e-9, 2e-9)):
        ticks = rounded(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 3 <= len(ticks) <= 7, (low, high, ticks)
    many = chart({"a": [(step, step) for step in range(10_000)]})
    assert many.count("<title>") <= 240
