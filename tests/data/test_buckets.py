import numpy as np
import pytest

from finetune.data.buckets import assign, sizes
from finetune.errors import FinetuneError


def test_buckets_have_the_pixels_and_the_sides_that_were_asked_for():
    for resolution, step in ((512, 64), (1024, 64), (768, 32), (64, 8)):
        found = sizes(resolution, step)
        assert (found % step == 0).all() and found.min() >= resolution // 2 and found.max() <= 2 * resolution
        area = found.prod(1)
        assert (area <= resolution ** 2).all() and (area > 0.75 * resolution ** 2).all()
        assert [resolution] * 2 in found.tolist()
        assert {tuple(size) for size in found.tolist()} == {(w, h) for h, w in found.tolist()}     # tall for each wide one
    assert sizes(512, 64, 384, 640).tolist() == [[640, 384], [576, 448], [512, 512], [448, 576], [384, 640]]


def test_a_step_that_leaves_no_bucket_is_refused():
    with pytest.raises(FinetuneError, match="data.buckets: no size"):
        sizes(512, 64, 600, 700)


def test_each_picture_goes_to_the_nearest_shape():
    known = sizes(512, 64)
    rng = np.random.default_rng(0)
    height, width = rng.integers(100, 3000, (2, 500))
    found = assign(height, width, known)
    for h, w, size in zip(height, width, found):
        off = np.abs(np.log(known[:, 1] / known[:, 0]) - np.log(w / h))
        assert np.isclose(abs(np.log(size[1] / size[0]) - np.log(w / h)), off.min())
    assert assign(np.array([480]), np.array([640]), known).tolist() == [[448, 576]]


def test_small_pictures_keep_their_size_if_they_must_not_be_enlarged():
    known = sizes(512, 64)
    height, width = np.array([2000, 300, 500, 63, 65]), np.array([2000, 333, 4000, 63, 2000])
    assert assign(height, width, known, 64).tolist() == [[512, 512], [256, 320], [256, 1024], [0, 0], [64, 1024]]
    assert assign(height, width, known).min() >= 256
