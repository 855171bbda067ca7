"""The kinds of noise: what they add, and that each number of it is drawn by position."""

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from finetune.diffusion import noise
from finetune.diffusion.epsilon import Epsilon

SHAPE, MANY = (4, 16, 24), list(range(400))
KINDS = [Epsilon(), Epsilon(offset=0.1), Epsilon(offset=0.1, offset_random=True), Epsilon(pyramid=0.4),
         Epsilon(perturbation=0.1), Epsilon(0.1, True, 0.4, 0.1)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_noise_does_not_depend_on_the_batch(kind):
    whole = kind.draw(SHAPE, 7, list(range(6)))
    assert whole.shape == (6, *SHAPE) and whole.dtype == torch.float32
    perturbed = kind.perturbed(whole, 7, list(range(6)))
    for p in range(6):
        alone = kind.draw(SHAPE, 7, [p])
        assert torch.equal(alone[0], whole[p])
        assert torch.equal(kind.perturbed(alone, 7, [p])[0], perturbed[p])


def test_plain_noise_is_the_draw_itself():
    plain = Epsilon()
    eps = plain.draw(SHAPE, 0, [3, 4])
    assert torch.equal(eps, noise.normal(SHAPE, 0, [3, 4], "noise"))
    assert plain.perturbed(eps, 0, [3, 4]) is eps


@pytest.mark.parametrize("random", [False, True])
def test_offset_moves_the_mean_of_each_channel(random):
    moved = Epsilon(offset=0.5, offset_random=random).draw(SHAPE, 0, MANY) - Epsilon().draw(SHAPE, 0, MANY)
    assert (moved - moved[:, :, :1, :1]).abs().max() < 1e-6         # the same over a channel
    offsets = moved[:, :, 0, 0]
    assert abs(offsets.mean()) < 0.05
    assert offsets.std().item() == pytest.approx(0.5 * (1 / 3) ** 0.5 if random else 0.5, rel=0.08)     # E u² = 1/3
    assert torch.corrcoef(offsets.T).fill_diagonal_(0).abs().max() < 0.2        # channels are independent


def test_pyramid_noise_has_unit_deviation_and_coarse_structure():
    def neighbours(x):
        return (x[..., 1:] * x[..., :-1]).mean().item()

    eps = Epsilon(pyramid=0.5).draw(SHAPE, 0, MANY)
    torch.testing.assert_close(eps.std(dim=(1, 2, 3)), torch.ones(400), rtol=1e-4, atol=0)
    assert neighbours(Epsilon().draw(SHAPE, 0, MANY)) == pytest.approx(0, abs=0.01)
    assert neighbours(eps) > 0.05
    weak = Epsilon(pyramid=1e-3).draw(SHAPE, 0, MANY[:3])
    torch.testing.assert_close(weak, Epsilon().draw(SHAPE, 0, MANY[:3]), rtol=0.05, atol=0.02)


def test_pyramid_noise_has_as_much_of_each_level_as_whitaker_s():
    def whitaker(height: int, width: int, discount: float) -> torch.Tensor:
        """As his report prints it, but for sizes of the picture's own side, as sd-scripts has them."""
        whole, size, i = torch.randn(1, 4, height, width), (height, width), 0
        while i == 0 or min(size) > 1:
            r = 2 + 2 * torch.rand(()).item()
            size = [max(1, int(side / r ** i)) for side in (height, width)]
            whole += discount ** i * interpolate(torch.randn(1, 4, *size), (height, width), mode="bilinear")
            i += 1
        return whole[0] / whole.std()

    torch.manual_seed(0)
    for discount in (0.3, 0.8):
        ours = Epsilon(pyramid=discount).draw((4, 16, 16), 0, MANY)
        theirs = torch.stack([whitaker(16, 16, discount) for _ in MANY])
        means, blocks = ([avg_pool2d(x, side).square().mean().item() for x in (ours, theirs)] for side in (16, 4))
        assert means[0] == pytest.approx(means[1], rel=0.15) and blocks[0] == pytest.approx(blocks[1], rel=0.05)


def test_perturbation_is_independent_of_the_noise():
    eps = Epsilon().draw(SHAPE, 0, MANY)
    extra = Epsilon(perturbation=0.1).perturbed(eps, 0, MANY) - eps
    assert extra.std().item() == pytest.approx(0.1, rel=0.01)
    assert abs((extra * eps).mean()) < 1e-3
