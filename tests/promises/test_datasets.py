"""The example pictures: drawn by the script to the byte, read by the Hugging Face library and by us."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(p for p in (ROOT / "datasets").iterdir() if p.is_dir())


def test_the_script_draws_them_to_the_byte(tmp_path):
    subprocess.run([sys.executable, ROOT / "scripts" / "make_datasets.py", "--out", tmp_path], check=True, capture_output=True)
    for folder in FOLDERS:
        assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / folder.name).iterdir()}
        for file in folder.iterdir():
            assert file.read_bytes() == (tmp_path / folder.name / file.name).read_bytes(), file


def test_they_are_small():
    assert sum(p.stat().st_size for p in (ROOT / "datasets").rglob("*") if p.is_file()) <= 3_000_000


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_both_readers_agree(folder, tmp_path, streamed):
    from datasets import load_dataset

    rows = load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path))
    ours = streamed(folder).index
    assert sorted(rows["text"]) == sorted(ours.columns(i)["text"] for i in range(len(ours)))
    assert (ours.width == 64).all() and (ours.height == 64).all()
    assert (folder / "README.md").is_file()
