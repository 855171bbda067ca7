"""What the documents say is true: the README's commands, the recipes they name, the wheel."""

import re
import shlex
import subprocess
import sys
import zipfile
from argparse import ArgumentParser
from pathlib import Path

import pytest

from finetune import registry
from finetune.recipe import load

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [shlex.split(line, comments=True)
            for line in re.findall(r"^    (?:accelerate launch -m )?(finetune .+)$", README.replace("\\\n", " "), re.M)]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[:40])
def test_every_command_of_the_readme_is_understood(words):
    command = registry.find("commands", words[1])
    parser = ArgumentParser(exit_on_error=False)
    command.add_arguments(parser)
    parser.parse_args(words[2:])


def test_the_readme_names_files_that_exist():
    for path in re.findall(r"\b((?:scripts|recipes|docs|datasets)/[\w./-]*\w)", README):
        assert (ROOT / path).exists(), path


def test_the_recipe_of_the_readme_is_a_recipe(tmp_path):
    (tmp_path / "readme.yaml").write_text(re.search(r"```yaml\n(.*?)```", README, re.S)[1])
    load(tmp_path / "readme.yaml")


def test_every_command_has_a_one_line_summary_and_says_help():
    for name in registry.names("commands"):
        assert 10 < len(registry.summary("commands", name)) < 90, name


@pytest.mark.slow
def test_the_wheel_holds_the_base_and_the_recipes(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for wanted in ("finetune/_recipes/quickstart.yaml", "finetune/assets/tiny/unet/diffusion_pytorch_model.safetensors",
                   "finetune/assets/tiny/tokenizer/merges.txt", "finetune/cli.py"):
        assert wanted in names
    assert not [name for name in names if name.startswith(("tests/", "datasets/", "runs/"))]
