import numpy as np
import pytest
import torch
from PIL import Image

from finetune.data.pixels import fit, fit_mask, plan_crop


@pytest.mark.parametrize("size", [(64, 64), (37, 64), (64, 37), (500, 64), (3, 2), (129, 128)])
@pytest.mark.parametrize("piece", [(32, 32), (24, 40), (48, 16)])
@pytest.mark.parametrize("where", [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_a_crop_lies_inside_the_scaled_picture(size, piece, where):
    crop = plan_crop(*size, piece, where)
    width, height = crop.scaled
    assert 0 <= crop.top <= height - piece[0] and 0 <= crop.left <= width - piece[1]
    assert height == piece[0] or width == piece[1]              # no more is cut away than must be
    assert crop.geometry(False) == (size[1], size[0], crop.top, crop.left, *piece)
    assert crop.geometry(True) == (size[1], size[0], crop.top, width - piece[1] - crop.left, *piece)
    x = fit(Image.new("RGB", size, (255, 128, 0)), crop, False)
    assert x.shape == (3, *piece) and x.dtype == torch.float32
    assert x[:, 5, 5].tolist() == pytest.approx([1, 0.004, -1], abs=1e-3)       # no black border came in


def test_pixels_are_the_crop_and_a_flip_is_its_mirror():
    array = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    crop = plan_crop(48, 32, (32, 32), (0.0, 0.25))
    x = fit(Image.fromarray(array), crop, False)
    assert crop.left == 4
    assert torch.equal(x, torch.from_numpy(array[:, 4:36].copy()).permute(2, 0, 1) / 127.5 - 1)
    assert torch.equal(fit(Image.fromarray(array), crop, True), x.flip(2))


def test_shrinking_averages_over_the_area():
    """A fine checkerboard becomes grey; taking single pixels would make it black or white."""
    board = np.indices((256, 256)).sum(0) % 2 * 255
    x = fit(Image.fromarray(board.astype(np.uint8)).convert("RGB"), plan_crop(256, 256, (32, 32)), False)
    assert x.abs().max() < 0.05


def test_a_mask_weighs_latent_pixels():
    mask = Image.new("L", (64, 32), 0)
    mask.paste(255, (16, 0, 36, 32))        # of the middle 32 × 32: columns 0 … 19
    x = fit_mask(mask, plan_crop(64, 32, (32, 32)), False, 8, 0.2)
    assert x.shape == (1, 4, 4)
    assert x[0, 0].tolist() == pytest.approx([1, 1, 0.6, 0.2], abs=0.02)
    assert torch.equal(fit_mask(mask, plan_crop(64, 32, (32, 32)), True, 8, 0.2), x.flip(2))
