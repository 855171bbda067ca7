from collections import Counter

import numpy as np
import pytest

from finetune.data.order import Order

BUCKET = np.array([0] * 11 + [1] * 1 + [2] * 4 + [3] * 7 + [4] * 2)
REPEATS = np.array([1, 2, 3, 1, 5] * 5)


@pytest.mark.parametrize("size", [1, 3, 4, 7, 100])
def test_each_example_is_seen_its_repeats_in_each_epoch(size):
    order = Order(BUCKET, REPEATS, size, 0)
    for epoch in range(3):
        steps = [order.examples(epoch * order.steps + step) for step in range(order.steps)]
        assert Counter(np.concatenate(steps).tolist()) == dict(enumerate(REPEATS.tolist()))
        assert all(1 <= len(step) <= size and len(set(BUCKET[step])) == 1 for step in steps)
    slots = np.bincount(BUCKET, REPEATS)
    assert order.steps == sum(-(-slots // size))        # the last of a bucket is smaller, no other


def test_an_order_is_a_function_of_seed_and_epoch():
    one, other = Order(BUCKET, REPEATS, 4, 0), Order(BUCKET, REPEATS, 4, 0)
    steps = range(5 * one.steps)
    late = {step: other.examples(step).tolist() for step in reversed(steps)}
    assert all(one.examples(step).tolist() == late[step] for step in steps)
    epochs = [[late[step] for step in steps[e * one.steps:(e + 1) * one.steps]] for e in range(5)]
    assert all(epochs[0] != epoch for epoch in epochs[1:])
    assert epochs[0] != [Order(BUCKET, REPEATS, 4, 1).examples(step).tolist() for step in range(one.steps)]


def test_buckets_are_mixed():
    """Neither runs of one bucket nor its small step at a fixed place."""
    order = Order(np.repeat([0, 1], 50), np.ones(100, int), 4, 0)
    first = [order.examples(epoch * order.steps)[0] // 50 for epoch in range(40)]
    assert 8 < sum(first) < 32
    small = [next(s for s in range(order.steps) if len(order.examples(epoch * order.steps + s)) < 4) for epoch in range(20)]
    assert len(set(small)) > 5


def test_a_far_step_costs_no_more_than_the_first():
    order = Order(np.zeros(3, int), np.ones(3, int), 2, 0)
    assert set(order.examples(10 ** 12).tolist()) <= {0, 1, 2}
