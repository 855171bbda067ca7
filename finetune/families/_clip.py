"""CLIP's text encoders: captions in pieces of 75 tokens, and the states that denoisers are told.

Shapes: P pieces · L tokens of a piece, 77 · D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.errors import FinetuneError

PIECES = 3      # of a long caption, at most: 225 tokens, what the field trains with


@dataclass(frozen=True)
class Clip:
    """What a family takes of an encoder."""

    hidden: int | None = None       # index of the hidden states, before the last norm. None: the last ones, behind it
    pooled: bool = False            # whether the projection of the end token's state is wanted too


def pieces(family, caption: str) -> tuple[list[list[int]], list[int]]:
    """The caption's tokens in pieces that CLIPs can take, one unless `long: chunk`, and those that are left over. The tokenizers
    of a family's CLIPs differ in nothing but what they fill up with."""
    words = family.tokenizers["text"]
    ids = words(caption, add_special_tokens=False, verbose=False).input_ids
    ids = family.learned.spelled(ids) if family.learned else ids
    room, most = words.model_max_length - 2, PIECES if family.long == "chunk" else 1
    found = [ids[first:first + room] for first in range(0, len(ids), room)] or [[]]
    return found[:most], sum(found[most:], [])


def refuse_cut(family, captions: list[str]) -> None:
    """Raise FinetuneError for a caption that would lose its end unordered."""
    for caption in captions:
        if cut := family.cut_text(caption):
            raise FinetuneError(f"a caption is too long for the text encoders; it would lose {cut!r}:\n    {caption}")


def states(encoder: nn.Module, tokenizer, pieces: list[list[int]], take: Clip) -> tuple[Tensor, Tensor | None]:
    """(P, L, D) and, where it is wanted, (P, D'), both float32."""
    rows = [[tokenizer.bos_token_id, *piece, tokenizer.eos_token_id] for piece in pieces]
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(row)) for row in rows])
    out = encoder(ids.to(encoder.device), output_hidden_states=take.hidden is not None)
    if take.hidden is None:
        return out.last_hidden_state.float(), None
    found = out.hidden_states[take.hidden].float()
    if out.last_hidden_state.requires_grad:     # layers that nothing is taken from: processes wait for their gradients, 0
        found = found + 0.0 * out.last_hidden_state.float().mean()
    return found, out.text_embeds.float() if take.pooled else None


def end_at(encoder: nn.Module, token: int) -> None:
    """Have the state of this token pooled. Published configs name another, whereupon CLIP takes that of the highest id, and
    this is a learned token's where there is one."""
    encoder.config.eos_token_id = token
    for module in encoder.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = token
