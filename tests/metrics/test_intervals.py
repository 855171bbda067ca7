"""Intervals cover the truth as often as they say, or nearly."""

import numpy as np
import pytest

from finetune.metrics import _intervals
from finetune.metrics._intervals import facts
from finetune.metrics.base import Measured, mean, over_pairs, share
from finetune.metrics.kid import kernel_distance

REPEATS = 200


def covered(draw, truth: float) -> float:
    found = [facts(*draw(np.random.default_rng(seed))) for seed in range(REPEATS)]
    return np.mean([one["low"] <= truth <= one["high"] for one in found])


@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    monkeypatch.setattr(_intervals, "RESAMPLES", 600)


def gamma(rng, n):
    return rng.gamma(2, 1, n)


def two(rng):
    """Two adapters on the same prompts and seeds: what a prompt is worth is common to both."""
    common = rng.normal(0, 3, 24)
    return mean(common + 0.5 + rng.normal(0, 1, 24)), mean(common + rng.normal(0, 1, 24))


def shares(rng):
    """Right together more often than by chance: 90 % and 80 % of 32."""
    at = rng.random(32)
    return share((at < 0.9) * 1.0), share((np.where(rng.random(32) < 0.5, at, rng.random(32)) < 0.8) * 1.0)


def pairs(rng):
    """Half the squared distance of pictures of one prompt, 8 prompts of 4 seeds: its mean is the variance, 3 numbers of 1."""
    prompts = np.repeat(np.arange(8), 4)
    x = 5 * rng.normal(size=(8, 3))[prompts] + rng.normal(size=(32, 3))
    values = np.square(x[:, None] - x).sum(-1) / 2
    return (Measured(32, over_pairs(values, prompts[:, None] == prompts)),)


@pytest.mark.parametrize("draw, truth", [
    (lambda rng: (mean(rng.normal(3, 2, 12)),), 3), (lambda rng: (mean(gamma(rng, 24)),), 2), (two, 0.5),
    (lambda rng: (share((rng.random(24) < 0.97) * 1.0),), 0.97), (lambda rng: (share((rng.random(12) < 0.5) * 1.0),), 0.5),
    (shares, 0.1), (pairs, 3), (lambda rng: (kernel_distance(rng.normal(size=(40, 8)), rng.normal(size=(40, 8))),), 0)])
def test_an_interval_covers_the_truth_in_nine_of_ten_repeats(draw, truth):
    assert covered(draw, truth) >= 0.9


def test_a_paired_difference_is_sharper_than_two_numbers():
    a, b = two(np.random.default_rng(0))
    width = {name: one["high"] - one["low"] for name, one in (("a", facts(a)), ("a - b", facts(a, b)))}
    assert width["a - b"] < width["a"] / 2


def test_a_share_of_all_is_not_certain():
    all_right = share(np.array([1.0] * 8 + [np.nan] * 3))
    found = facts(all_right)
    assert found["value"] == 1 and 0.6 < found["low"] < 0.7        # Wilson: 8 / (8 + 1.96²)
    assert facts(all_right, all_right)["low"] < 0 < facts(all_right, all_right)["high"]


def test_nothing_is_said_of_what_does_not_count():
    assert facts(mean(np.array([np.nan, np.nan]))) == {"value": None, "low": None, "high": None}
    assert facts(mean(np.array([2.0])))["low"] is None
    assert facts(mean(np.array([1.0, 3.0, np.nan])))["value"] == 2


def test_a_picture_makes_no_pair_with_itself():
    values = np.array([[9.0, 1, 2], [1, 9, 3], [2, 3, 9]])
    of = over_pairs(values, np.ones((3, 3)))
    assert of(np.array([[1.0, 1, 1], [2, 1, 0], [3, 0, 0]])).tolist() == pytest.approx([2, 1, np.nan], nan_ok=True)
