"""Numbers by position. `python tests/diffusion/test_noise.py` writes tests/golden/noise.json anew; no run resumes then."""

import json
from pathlib import Path

import pytest
import torch

from finetune.diffusion import noise

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "noise.json"
DRAWS = [(seed, position, stream) for seed in (0, 2**31) for position in (0, 1, 10**6)
         for stream in ("noise", "timestep", "posterior")]


def numbers() -> list[dict]:
    return [{"seed": seed, "position": position, "stream": stream,
             "derive": noise.derive(seed, position, stream), "uniform": noise.uniform(seed, position, stream),
             "permutation": noise.permutation(7, seed, position, stream).tolist(),
             "normal": noise.normal((4, 8, 8), seed, [position], stream).flatten()[[0, 1, 100, 255]].tolist()}
            for seed, position, stream in DRAWS]


def test_numbers_are_what_earlier_versions_drew():
    """On any processor, with any torch."""
    for now, then in zip(numbers(), json.loads(GOLDEN.read_text())["draws"], strict=True):
        assert now.pop("normal") == pytest.approx(then.pop("normal"), rel=0, abs=1e-6)
        assert now == then


@pytest.mark.parametrize("sizes", [[6], [1] * 6, [2, 4], [3, 3]])
def test_a_draw_does_not_depend_on_the_batch(sizes):
    whole = noise.normal((4, 5, 3), 7, list(range(6)), "noise")
    parts = torch.split(torch.arange(6), sizes)
    assert torch.equal(torch.cat([noise.normal((4, 5, 3), 7, p.tolist(), "noise") for p in parts]), whole)
    uniforms = noise.uniforms(7, list(range(6)), "timestep")
    assert torch.equal(torch.cat([noise.uniforms(7, p.tolist(), "timestep") for p in parts]), uniforms)


def test_seeds_positions_and_streams_draw_differently():
    draws = [(seed, position, stream) for seed in (0, 1, 10, 100) for position in (0, 1, 11, 110)
             for stream in ("a", "b", "0/a")]
    assert len({noise.derive(*draw) for draw in draws}) == len(draws)
    assert len({noise.uniform(*draw) for draw in draws}) == len(draws)
    assert len({noise.normal((3,), draw[0], [draw[1]], draw[2]).numpy().tobytes() for draw in draws}) == len(draws)


def test_torchs_own_generator_neither_matters_nor_moves():
    torch.manual_seed(0)
    first, state = noise.normal((9,), 0, [3], "noise"), torch.get_rng_state()
    noise.permutation(5, 0, 0, "order")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(noise.normal((9,), 0, [3], "noise"), first)


def test_uniforms_are_uniform_and_neighbours_unrelated():
    u = noise.uniforms(0, list(range(20_000)), "timestep")
    assert u.dtype == torch.float64 and 0 <= u.min() and u.max() < 1
    counts = torch.histc(u.float(), 20, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 45         # chi-square with 19 degrees: p = 0.0007
    assert torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1].abs() < 0.03


def test_normals_are_standard_normal():
    x = noise.normal((4, 8, 8), 3, list(range(400)), "noise")
    assert x.dtype == torch.float32 and abs(x.mean()) < 0.015 and abs(x.std() - 1) < 0.01
    assert torch.corrcoef(x[:40].flatten(1)).fill_diagonal_(0).abs().max() < 0.3


def test_a_permutation_is_one():
    orders = [noise.permutation(20, 0, epoch, "order").tolist() for epoch in range(5)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len(set(map(tuple, orders))) == 5


if __name__ == "__main__":
    note = "written by: python tests/diffusion/test_noise.py; a change here breaks the exact resume of every run"
    GOLDEN.write_text(json.dumps({"made_by": note, "draws": numbers()}, indent=1) + "\n")
