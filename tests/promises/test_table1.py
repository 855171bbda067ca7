"""Every row of the Stable Diffusion 3 paper's Table 1 is an objective of a recipe, and trains."""

import importlib.util
import math
from pathlib import Path

import pytest

from finetune import registry

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("table1", ROOT / "scripts" / "table1.py")
table1 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table1)


@pytest.fixture(scope="module")
def ground():
    family = registry.find("families", "sd1").load("tiny")
    return family, *table1.style(family)


@pytest.mark.parametrize("row", table1.ROWS)
def test_a_row_trains(row, ground):
    family, latents, tokens = ground
    losses = table1.train(family, table1.ROWS[row][1], latents, tokens, steps=2)
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)


def test_the_page_shows_what_the_script_trains():
    page = (ROOT / "docs" / "table1.md").read_text(encoding="utf-8")
    for row, (rank, words) in table1.ROWS.items():
        line = next(line for line in page.splitlines() if line.startswith(f"| {row} | {rank:.2f} |"))
        assert f"`{words}`" in line and float(line.split(" | ")[4]) < 1
