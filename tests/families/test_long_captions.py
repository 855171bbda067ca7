"""Captions of more than 75 tokens, on the tiny base."""

import pytest
import torch

from finetune import registry
from finetune.batch import Conditioning, joined
from finetune.errors import FinetuneError

SHORT = "a red circle on white"


@pytest.fixture(scope="module")
def base():
    return registry.find("families", "sd1").load("tiny")


@pytest.fixture
def family(base):
    yield base
    base.__dict__.pop("long", None)


def colours(count):
    """So many different-looking tokens, each of them a word."""
    return " ".join(["red", "blue", "green"][n * n % 7 % 3] for n in range(count))


def by_hand(family, caption):
    """A caption of at most 75 tokens, by the tokenizer's own padding."""
    ids = family.tokenizers["text"]([caption], padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (1, 77)
    return family.parts["text"](ids)[0].float()


@torch.no_grad()
@pytest.mark.parametrize("long", ["error", "truncate", "chunk"])
@pytest.mark.parametrize("caption", ["", SHORT, colours(75)])
def test_what_fits_is_the_same_under_every_policy(family, long, caption):
    family.long = long
    told = family.encode_text([caption])
    assert torch.equal(told.tokens, by_hand(family, caption)) and told.mask is None and not family.cut_text(caption)


def test_a_long_caption_is_an_error_by_default(family):
    assert family.long == "error" and family.cut_text(colours(77)) == " ".join(colours(77).split()[75:])
    with pytest.raises(FinetuneError, match="too long for the text encoders; it would lose"):
        family.encode_text([SHORT, colours(76)])


@torch.no_grad()
def test_truncate_keeps_what_the_tokenizer_keeps(family):
    family.long = "truncate"
    ids = family.tokenizers["text"](colours(90), truncation=True, return_tensors="pt").input_ids
    told = family.encode_text([colours(90)])
    assert torch.equal(told.tokens, family.parts["text"](ids)[0]) and told.mask is None
    assert torch.equal(told.tokens, by_hand(family, colours(75)))
    assert family.cut_text(colours(90)) == ""       # nothing is lost that nobody ordered


@torch.no_grad()
@pytest.mark.parametrize("count, pieces", [(75, 1), (76, 2), (150, 2), (151, 3), (225, 3)])
def test_chunks_are_the_pieces_one_behind_the_other(family, count, pieces):
    family.long = "chunk"
    words = colours(count).split()
    told = family.encode_text([colours(count)])
    assert told.tokens.shape == (1, 77 * pieces, 128) and told.mask is None
    parts = [by_hand(family, " ".join(words[first:first + 75])) for first in range(0, count, 75)]
    torch.testing.assert_close(told.tokens, torch.cat(parts, 1), rtol=0, atol=1e-5)


def test_more_than_three_chunks_are_an_error(family):
    family.long = "chunk"
    assert family.cut_text(colours(225)) == "" and family.cut_text(colours(226)) == colours(226).split()[-1]
    with pytest.raises(FinetuneError, match="would lose"):
        family.encode_text([colours(226)])


@torch.no_grad()
def test_a_prediction_does_not_depend_on_longer_neighbours(family):
    family.long = "chunk"
    captions = [SHORT, colours(200), "", colours(100)]
    told = family.encode_text(captions)
    assert told.mask.sum(1).tolist() == [77, 231, 77, 154] and not told.tokens[~told.mask].any()
    x, t = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([20, 300, 600, 990])
    together = family.denoise(x, t, told, None)
    for n, caption in enumerate(captions):
        alone = family.denoise(x[n:n + 1], t[n:n + 1], family.encode_text([caption]), None)
        torch.testing.assert_close(together[n:n + 1], alone, rtol=0, atol=1e-5)
    masked = family.denoise(x, t, Conditioning(told.tokens), None)
    assert (masked[0] - together[0]).abs().max() > 1e-3         # without the mask, the zeros are listened to


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [True, False])
def test_a_prediction_does_not_depend_on_what_is_hidden_in_half_precision(family, dtype, mixed):
    """Whatever stands behind the mask has exactly no weight: its bias of −10000 is a number of these types too."""
    family.long = "chunk"
    told = family.encode_text([SHORT, colours(200)])
    noisy = Conditioning(told.tokens + 3 * ~told.mask[..., None], None, told.mask)
    x, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([300, 600])
    try:
        family.parts["denoiser"].to(torch.float32 if mixed else dtype)
        with torch.autocast("cpu", dtype, enabled=mixed):
            one, other = (family.denoise(x, t, c, None) for c in (told, noisy))
    finally:
        family.parts["denoiser"].to(torch.float32)
    assert one.isfinite().all() and torch.equal(one, other)


def some(B, L, pooled=True, mask=None):
    return Conditioning(torch.randn(B, L, 3), torch.randn(B, 5) if pooled else None, mask)


def test_joined_without_anything_to_fill_has_no_mask():
    parts = [some(1, 4), some(2, 4)]
    whole = joined(parts)
    assert whole.mask is None and torch.equal(whole.tokens, torch.cat([p.tokens for p in parts]))
    assert torch.equal(whole.pooled, torch.cat([p.pooled for p in parts]))


def test_joined_fills_up_with_zeros_and_says_so():
    own = torch.tensor([[True, True, False]])
    parts = [some(2, 2, False), some(1, 5, False), some(1, 3, False, own)]
    whole = joined(parts)
    assert whole.pooled is None and whole.tokens.shape == (4, 5, 3) and whole.mask.dtype == torch.bool
    assert whole.mask.int().tolist() == [[1, 1, 0, 0, 0]] * 2 + [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert torch.equal(whole.tokens[:2, :2], parts[0].tokens) and not whole.tokens[:2, 2:].any()
    again = joined([joined(parts[:2]), parts[2]])
    assert torch.equal(again.tokens, whole.tokens) and torch.equal(again.mask, whole.mask)


def test_joined_keeps_a_mask_where_all_are_of_one_length():
    whole = joined([some(1, 2), some(1, 2, mask=torch.tensor([[True, False]]))])
    assert whole.mask.tolist() == [[True, True], [True, False]]


def test_a_batch_takes_the_mask_to_the_device():
    from finetune.batch import Batch
    from finetune.train.loop import to_device

    told = joined([some(1, 2), some(1, 4)])
    moved = to_device(Batch([0, 1], ["", ""], torch.ones(2), 0.5, torch.zeros(2, 6), conditioning=told), torch.device("cpu"))
    assert torch.equal(moved.conditioning.mask, told.mask)
