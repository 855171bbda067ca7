import math

import pytest

from finetune.optim.schedule import SHAPES, factor


def curve(kind, steps, warmup=0):
    return [factor(kind, step, steps, warmup) for step in range(steps)]


def test_shapes_are_the_formulas():
    assert curve("constant", 5) == [1] * 5
    assert curve("linear", 5) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert curve("cosine", 4) == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


@pytest.mark.parametrize("kind", SHAPES)
def test_the_warm_up_climbs_and_the_shape_runs_over_the_rest(kind):
    whole = curve(kind, 14, warmup=4)
    assert whole[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert whole[4:] == curve(kind, 10)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 1), (2, 1), (3, 3), (3, 100), (1000, 0), (1000, 999)])
def test_every_step_learns_and_none_more_than_the_peak(kind, steps, warmup):
    values = curve(kind, steps, warmup)
    assert all(0 < value <= 1 for value in values)
    rest = values[min(warmup, steps):]
    assert rest == sorted(rest, reverse=True)
