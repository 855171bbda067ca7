import math

import pytest

from finetune.optim.schedule import SHAPES, factor

OPTIONS = {"cosine_restarts": {"cycles": 3}, "polynomial": {"power": 2.0}, "wsd": {"decay": 0.25}}
FALLING = [kind for kind in SHAPES if kind not in ("constant", "cosine_restarts")]


def curve(kind, steps, warmup=0, floor=0.0, **options):
    options = options or OPTIONS.get(kind, {})
    return [factor(kind, step, steps, warmup, floor, **options) for step in range(steps)]


def test_shapes_are_the_formulas():
    half = math.sqrt(0.5)
    assert curve("constant", 5) == [1] * 5
    assert curve("linear", 5) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert curve("cosine", 4) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert curve("cosine_restarts", 8, cycles=2) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2] * 2)
    assert curve("polynomial", 4, power=2.0) == pytest.approx([1, 9 / 16, 4 / 16, 1 / 16])
    assert curve("wsd", 8, decay=0.5) == pytest.approx([1, 1, 1, 1, 1, 1 - 0.5, 1 - half, 1 - math.sqrt(0.75)])


@pytest.mark.parametrize("kind, formula", [
    ("constant", lambda progress: 1.0),
    ("linear", lambda progress: 1.0 - progress),
    ("cosine", lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress))),
])
def test_the_first_release_gave_the_same_bits(kind, formula):
    for steps, warmup in [(7, 0), (900, 20), (1000, 999)]:
        expected = [(step + 1) / warmup for step in range(warmup)]
        expected += [formula((step - warmup) / (steps - warmup)) for step in range(warmup, steps)]
        assert curve(kind, steps, warmup) == expected


@pytest.mark.parametrize("kind, other", [
    ("cosine_restarts", {"cycles": 1}), ("polynomial", {"power": 1.0}), ("wsd", {"decay": 1e-9})])
def test_special_cases_are_other_shapes(kind, other):
    same = {"cosine_restarts": "cosine", "polynomial": "linear", "wsd": "constant"}[kind]
    assert curve(kind, 100, 10, 0.1, **other) == curve(same, 100, 10, 0.1)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("floor", [0.0, 0.1, 0.3])
def test_the_warm_up_climbs_and_the_shape_runs_over_the_rest(kind, floor):
    whole = curve(kind, 14, warmup=4, floor=floor)
    assert whole[:4] == [0.25, 0.5, 0.75, 1]
    assert whole[4] == 1, "the shape begins where the warm-up ends"
    assert whole[4:] == curve(kind, 10, floor=floor)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 1), (2, 1), (3, 3), (3, 100), (1000, 0), (1000, 990)])
def test_every_step_learns_and_none_more_than_the_peak(kind, steps, warmup, floor):
    values = curve(kind, steps, warmup, floor)
    rest = values[min(warmup, steps):]
    assert all(0 < value <= 1 for value in values) and all(value > floor or kind == "constant" for value in rest)
    if kind != "cosine_restarts":
        assert rest == sorted(rest, reverse=True)


@pytest.mark.parametrize("kind", FALLING)
@pytest.mark.parametrize("floor", [0.0, 0.1, 0.3])
def test_the_floor_is_reached_as_the_last_step_ends(kind, floor):
    assert factor(kind, 1000, 1000, 100, floor, **OPTIONS.get(kind, {})) == floor
    assert floor < curve(kind, 1000, 100, floor)[-1] < floor + 0.01


@pytest.mark.parametrize("kind", FALLING)
def test_no_step_falls_far(kind):
    """1 − √x falls fastest where it begins: by √(1/250) over 250 steps."""
    values = curve(kind, 1000)
    assert max(a - b for a, b in zip(values, values[1:])) <= (0.0633 if kind == "wsd" else 0.002)


@pytest.mark.parametrize("cycles, steps", [(2, 10), (3, 300), (49, 49 * 7), (7, 100)])
def test_every_restart_is_at_the_peak(cycles, steps):
    values = curve("cosine_restarts", steps, floor=0.1, cycles=cycles)
    rises = [step for step in range(1, steps) if values[step] > values[step - 1]]
    assert rises == [-(-steps * n // cycles) for n in range(1, cycles)]
    assert all(values[step] > 0.99 for step in rises) and (steps % cycles or all(values[step] == 1 for step in rises))


def test_the_decay_begins_where_it_is_told():
    values = curve("wsd", 1010, 10, decay=0.2)
    assert values[:9] < [1] * 9 and values[9:811] == [1] * 802 and values[811] < 1
