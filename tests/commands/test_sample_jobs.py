"""Files of prompts, and what is wrong with them."""

import json

import pytest

from finetune.errors import FinetuneError
from finetune.train.jobs import jobs, read

ROWS = [{"prompt": "a dog", "negative": "cat", "seed": 7, "steps": 3, "guidance": 2, "size": "64x32", "count": 2},
        {"prompt": "a car: red", "image": "a.png", "strength": 0.5}]
YAML = """
- {prompt: a dog, negative: cat, seed: 7, steps: 3, guidance: 2, size: 64x32, count: 2}
- prompt: "a car: red"
  image: a.png
  strength: 0.5
"""


def test_jsonl_and_yaml_say_the_same_and_count_more_than_the_command_line(tmp_path):
    (tmp_path / "jobs.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    (tmp_path / "jobs.yaml").write_text(YAML)
    one, other = (jobs(read(tmp_path / name), {"seed": 1, "steps": 9, "negative": "grey"})
                  for name in ("jobs.jsonl", "jobs.yaml"))
    assert one == other
    assert [(job.seed, job.steps, job.negative, job.size, job.image) for job in one] == [
        (7, 3, "cat", (32, 64), None), (8, 3, "cat", (32, 64), None), (1, 9, "grey", None, tmp_path / "a.png")]
    (tmp_path / "jobs.txt").write_text("a dog\r\n\n  {a cat}  \n")
    assert [job.prompt for job in jobs(read(tmp_path / "jobs.txt"), {})] == ["a dog", "{a cat}"]


@pytest.mark.parametrize("name, text, said", [
    ("a.jsonl", '{"prompt": "x"}\n{"prompt": "x", "sede": 1}', "a.jsonl:2  sede: unknown key; did you mean 'seed'?"),
    ("a.jsonl", '{"prompt": "x"}\n\n{"prompt": "x", "steps": "4"}', "a.jsonl:3  steps: wants a whole number; given '4'"),
    ("a.jsonl", '{"seed": 1}', "a.jsonl:1  prompt: missing"),
    ("a.jsonl", '{"prompt": "x"}\n{prompt: x}', "a.jsonl:2: not a line of JSON"),
    ("a.jsonl", '["x"]', "a.jsonl:1: a line is an object"),
    ("a.jsonl", '{"prompt": "x", "prompt": "y"}', "'prompt' is written twice"),
    ("a.jsonl", '{"prompt": "x", "guidance": NaN}', "guidance: wants a finite number"),
    ("a.jsonl", '{"prompt": "x", "image": "\\u0000", "strength": 2}', "a.jsonl:1  strength: wants at most 1; given 2"),
    ("a.jsonl", "[" * 100_000, "a.jsonl:1: not a line of JSON"),
    ("a.yaml", "- prompt: x\n  size: 64\n", "a.yaml:1  size: wants a list; given 64"),
    ("a.yaml", "- x\n- prompt: y\n  size: 64 x 64\n", "a.yaml:2  size: WIDTHxHEIGHT in pixels"),
    ("a.yaml", "- !!python/object/apply:os.system [x]\n", "a.yaml:1  0: the tag"),
    ("a.yaml", "prompt: x\n", "a list is needed"),
    ("a.yaml", "- {prompt: x, mask: a.png}\n", "a.yaml:1: mask is about an image"),
    ("a.yaml", "- [\n", "not valid YAML"),
    ("a.txt", " \n", "holds no prompt"),
    ("a.json", "[]", "prompts are read from .txt, .jsonl, .yaml, .yml; not from .json"),
])
def test_mistakes_are_told_with_their_line(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(FinetuneError) as error:
        jobs(read(tmp_path / name), {})
    assert said in str(error.value)


def test_all_mistakes_at_once_and_those_of_the_command_line_once(tmp_path):
    (tmp_path / "a.txt").write_text("x\ny\nz")
    with pytest.raises(FinetuneError) as error:
        jobs(read(tmp_path / "a.txt"), {"steps": 0, "size": "big"})
    assert str(error.value).splitlines() == ["--steps: wants at least 1; given 0",
                                             "--size: WIDTHxHEIGHT in pixels is needed, as in 512x768"]
