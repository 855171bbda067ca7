import os
import subprocess
import sys
import time

import pytest

from finetune import __version__, cli, registry
from finetune.errors import FinetuneError
from finetune.recipe import shipped

HEAVY = ("torch", "pydantic", "ruamel", "numpy", "diffusers", "transformers", "accelerate", "PIL")


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def finetune(*arguments: str) -> subprocess.CompletedProcess:
    return python("-m", "finetune", *arguments)


def test_help_lists_every_command_and_is_fast():
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        said = finetune("--help")
        seconds.append(time.perf_counter() - begin)
    assert said.returncode == 0
    for name in registry.names("commands"):
        assert f"  {name} " in said.stdout
        assert registry.summary("commands", name) in said.stdout
    assert min(seconds) <= 0.5
    assert finetune().stdout == said.stdout


def test_help_imports_nothing_heavy():
    code = ("import sys; from finetune import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
            "print(*sys.modules, file=sys.stderr)")
    loaded = python("-c", code).stderr.split()
    assert "argparse" in loaded
    assert not [name for name in loaded if name.partition(".")[0] in HEAVY]


@pytest.mark.parametrize("name", registry.names("commands"))
def test_the_help_of_each_command(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: finetune {name}")


def test_a_command_is_imported_without_torch():
    code = ("import importlib, sys\n"
            "for name in sys.argv[1:]:\n"
            "    importlib.import_module(f'finetune.commands.{name}')\n"
            "    assert 'torch' not in sys.modules, name")
    said = python("-c", code, *registry.names("commands"))
    assert said.returncode == 0, said.stderr


def test_version():
    assert finetune("--version").stdout == f"finetune {__version__}\n"


def test_the_users_mistake(capsys, tmp_path):
    assert cli.main(["trian", "x.yaml"]) == 2
    assert "unknown command 'trian'; did you mean 'train'?" in capsys.readouterr().err
    said = finetune("train", str(tmp_path / "no.yaml"))
    assert said.returncode == 2
    assert said.stderr.startswith(f"finetune: error\n{tmp_path / 'no.yaml'}: there is no such recipe")
    assert "Traceback" not in said.stderr


@pytest.mark.parametrize("arguments", [["--bogus"], ["train"], ["recipes", "--bogus"]])
def test_arguments_that_do_not_exist(arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("error, code, said", [
    (MemoryError(), 2, "error\nthere is not enough memory: for so much at once\n    fewer pictures at a time, smaller ones, or numbers "
                       "of 16 bits need less"),
    (FinetuneError("no"), 2, "error\nno"), (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(36, "File name too long", b"x"), 2, "error\nx: File name too long"),
    (OSError(28, "No space left on device"), 2, "error\n[Errno 28] No space left on device")])
def test_how_a_command_ends(monkeypatch, capsys, error, code, said):
    def run(arguments):
        raise error

    monkeypatch.setattr(registry.find("commands", "recipes"), "run", run)
    assert cli.main(["recipes"]) == code
    assert capsys.readouterr().err == f"finetune: {said}\n"


@pytest.mark.parametrize("without", [">&-", "2>&-", "> /dev/full", "| cat"])
def test_output_that_cannot_be_said(without):
    command = f"{sys.executable} -m finetune recipes {without}"
    said = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii:strict"})
    assert (said.returncode != 0) == ("full" in without) and "Traceback" not in said.stderr, said.stderr


def test_our_mistake_passes_through(monkeypatch):
    monkeypatch.setattr(registry.find("commands", "recipes"), "run", lambda arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["recipes"])


def test_a_reader_that_leaves_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    code = ("from finetune import cli, registry\n"
            "registry.find('commands', 'recipes').run = lambda arguments: print('x') or 0\n"
            "raise SystemExit(cli.main(['recipes']))")
    said = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (said.returncode, said.stderr) == (141, "")


def test_nothing_is_collected_at_the_end():
    said = python("-c", "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count())); from finetune import cli\n"
                  "raise SystemExit(cli.main(['recipes']))")
    assert int(said.stdout.split()[-1]) > 1000


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "quick.yaml").write_text("# run it so\n# and so\nbase: {}  # not this\n")
    monkeypatch.setattr(shipped, "folder", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


def test_recipes_are_listed(recipes, capsys):
    assert cli.main(["recipes"]) == 0
    assert capsys.readouterr().out == "quick\n    run it so\n    and so\n"


def test_a_recipe_is_copied_and_never_overwrites(recipes, capsys, tmp_path):
    assert cli.main(["recipes", "copy", "quick"]) == 0
    assert (tmp_path / "quick.yaml").read_bytes() == (recipes / "quick.yaml").read_bytes()
    (tmp_path / "quick.yaml").write_text("mine")
    assert cli.main(["recipes", "copy", "quick"]) == 2
    assert "quick.yaml: exists and is not overwritten" in capsys.readouterr().err
    assert (tmp_path / "quick.yaml").read_text() == "mine"
    (tmp_path / "folder").mkdir()
    assert cli.main(["recipes", "copy", "quick", "--to", "folder"]) == 0
    assert (tmp_path / "folder" / "quick.yaml").exists()
    assert cli.main(["recipes", "copy", "quick", "--to", "nowhere/x.yaml"]) == 2
    assert cli.main(["recipes", "copy", "quik"]) == 2
    assert "unknown recipe 'quik'; did you mean 'quick'?" in capsys.readouterr().err
