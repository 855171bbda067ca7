"""The encoding pass: every picture and caption through the frozen encoders once, before the first step."""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from finetune.batch import Conditioning
from finetune.data.captions import caption
from finetune.data.loader import CENTRE, View
from finetune.data.pixels import fit, plan_crop, read
from finetune.data.scan import Example
from finetune.errors import FinetuneError


def pictures(examples: list[Example], view: View, moments: Callable[[Tensor], Tensor], quiet: bool) -> list[Tensor]:
    """Posterior moments per example, (1 or 2, 2C, h, w) on the CPU; the second is of the mirrored picture.

    One picture at a time, so that its latents do not depend on its neighbours. Raises FinetuneError, naming the file,
    when the encoder gives a number that is not finite."""
    rows = []
    for example in tqdm(examples, desc="encode pictures", unit="img", disable=quiet, leave=False):
        image = read(example.file)
        crop = plan_crop(image.width, image.height, view.resolution, CENTRE)
        row = torch.cat([moments(fit(image, crop, flip)[None]).cpu() for flip in (False, True)[: 1 + view.flip]])
        if not row.isfinite().all():
            raise FinetuneError(f"{example.file}: the VAE gives latents that are not finite; try base.dtype: float32")
        rows.append(row)
    return rows


@torch.no_grad()
def texts(examples: list[Example], view: View, encode: Callable[[list[str]], Conditioning]) -> dict[str, Conditioning]:
    """The states of every caption that the run can draw, on the CPU. Raises FinetuneError, naming the file."""
    states: dict[str, Conditioning] = {}
    for example in examples:
        if (text := caption(view.template, example.columns)) not in states:
            try:
                states[text] = encode([text])
            except FinetuneError as e:
                raise FinetuneError(f"data.images: {example.file}: {e}") from None
    if view.dropout:
        states[""] = encode([""])
    for text, state in states.items():
        if not state.tokens.isfinite().all():
            raise FinetuneError(f"the text encoder gives states that are not finite for {text!r}; try base.dtype: float32")
    return {t: Conditioning(s.tokens.cpu(), None if s.pooled is None else s.pooled.cpu()) for t, s in states.items()}
