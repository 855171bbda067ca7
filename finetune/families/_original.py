"""The names that models were published with, and those of diffusers and transformers, which are ours.

A table has a row for every tensor of the original file. It is made from the names of our model, so that a model of any depth
and width has one, and so that no tensor of ours can be forgotten. Sources: CompVis/latent-diffusion and
Stability-AI/generative-models (UNet, VAE), mlfoundations/open_clip (text), Stability-AI/sd3-ref (MM-DiT).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from finetune.errors import FinetuneError
from finetune.families._vae import ldm_names

if TYPE_CHECKING:  # a table of names needs no torch
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One tensor of the original file and ours that it becomes."""

    theirs: str                 # "" for one that the file does not hold
    ours: tuple[str, ...]
    how: str = "same"           # or fused · transposed · convolution · swapped · tied · identity

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Of their tensor, from the shapes of ours."""
        first, *rest = shapes[self.ours[0]]
        change = {"fused": (first * len(self.ours), *rest), "transposed": (*rest, first), "convolution": (first, *rest, 1, 1)}
        return change.get(self.how, (first, *rest))


def read(fetch: Callable[[str], Tensor], table: Iterable[Row], shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Tensor]]:
    """Our (name, tensor) pairs, one after the other, bit for bit. `fetch` gives the tensor that has a name of theirs."""
    import torch

    for row in table:
        t = torch.eye(shapes[row.ours[0]][0]) if row.how == "identity" else fetch(row.theirs)
        if row.how == "fused":
            yield from zip(row.ours, t.chunk(len(row.ours)))
        elif row.how == "transposed":
            yield row.ours[0], t.t().contiguous()
        elif row.how == "convolution":      # some files have it as a linear layer already
            yield row.ours[0], t.flatten(1)
        elif row.how == "swapped":
            yield row.ours[0], torch.cat(t.chunk(2)[::-1])
        else:
            yield from ((name, t) for name in row.ours)


def write(tensors: Mapping[str, Tensor], table: Iterable[Row]) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `read`. FinetuneError for a tensor that the original has no place for."""
    import torch

    for row in table:
        t = tensors[row.ours[0]]
        if row.how == "identity":
            if not torch.equal(t, torch.eye(len(t), dtype=t.dtype, device=t.device)):
                raise FinetuneError(f"{row.ours[0]} of its first text encoder is no identity, and a single file has no place "
                                    "for it: write a diffusers folder")
        elif row.how == "fused":
            yield row.theirs, torch.cat([tensors[name] for name in row.ours])
        elif row.how == "transposed":
            yield row.theirs, t.t().contiguous()
        elif row.how == "convolution":
            yield row.theirs, t[..., None, None]
        elif row.how == "swapped":
            yield row.theirs, torch.cat(t.chunk(2)[::-1])
        else:
            yield row.theirs, t


def rows(kind: str, names: Iterable[str]) -> list[Row]:
    """The table of a part of this kind, one of KINDS, that has tensors of these names of ours (with `text_model.`)."""
    table: dict[str, Row] = {}
    for name, theirs, how in KINDS[kind](list(names)):
        earlier = table.get(theirs or name)
        assert not earlier or how in ("fused", "tied"), f"{name} and {earlier} both are {theirs}"
        ours = (*earlier.ours, name) if earlier else (name,)
        table[theirs or name] = Row(theirs, tuple(sorted(ours, key=lambda name: name.translate(QKV))), how)
    return list(table.values())


QKV = str.maketrans("qkv", "012")       # the order in which they are fused


Placed = Iterator[tuple[str, str, str]]         # our name, theirs, how

UNET = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2", "conv_norm_out": "out.0", "conv_out": "out.2",
}
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}


def unet_places(blocks: int, layers: int, attended: Container[int]) -> dict[str, str]:
    """Our module -> that of a UNet of LDM or SGM, which counts every layer and sampler through all blocks. `layers` are those
    of a block on the way down; an upsampler stands behind the attention, in the blocks that have it on the way up."""
    places, span = dict(UNET), layers + 1
    for block in range(blocks):
        for slot, what in enumerate(("resnets", "attentions")):
            places |= {f"down_blocks.{block}.{what}.{i}": f"input_blocks.{1 + span * block + i}.{slot}" for i in range(layers)}
            places |= {f"up_blocks.{block}.{what}.{i}": f"output_blocks.{span * block + i}.{slot}" for i in range(span)}
        places[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{span * (block + 1)}.0.op"
        places[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{span * block + layers}.{1 + (block in attended)}.conv"
    return places


def moved(path: str, places: Mapping[str, str], layers: Mapping[str, str] = RESNET) -> str:
    """The path with its place in the UNet replaced, and the layer of a resnet there; one of no known place stays."""
    place = max((place for place in places if f"{path}.".startswith(f"{place}.")), key=len, default=None)
    if place is None:
        return path
    rest = _start(f"{path[len(place) + 1:]}.", {f"{old}.": f"{new}." for old, new in layers.items()})
    return f"{places[place]}.{rest}".rstrip(".")


def _unet(names: list[str]) -> Placed:
    found = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.")
    blocks = {match.groups() for name in names if (match := found.match(name))}
    down = [(int(block), int(layer)) for side, block, what, layer in blocks if (side, what) == ("down", "resnets")]
    attended = {int(block) for side, block, what, _ in blocks if (side, what) == ("up", "attentions")}
    places = unet_places(1 + max(block for block, _ in down), 1 + max(layer for _, layer in down), attended)
    yield from ((name, moved(name, places), "same") for name in names)


def _vae(names: list[str]) -> Placed:
    yield from ((name, ldm, "convolution" if linear else "same") for name, (ldm, linear) in ldm_names(names).items())


MMDIT = {
    "pos_embed.pos_embed": "pos_embed", "pos_embed.proj.": "x_embedder.proj.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
    "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.", "proj_out.": "final_layer.linear.",
    "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
    "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
}
JOINT = {
    "norm1.linear.": "x_block.adaLN_modulation.1.", "norm1_context.linear.": "context_block.adaLN_modulation.1.",
    "attn.to_out.0.": "x_block.attn.proj.", "attn.to_add_out.": "context_block.attn.proj.",
    "attn.norm_q.": "x_block.attn.ln_q.", "attn.norm_k.": "x_block.attn.ln_k.",
    "attn.norm_added_q.": "context_block.attn.ln_q.", "attn.norm_added_k.": "context_block.attn.ln_k.",
    "attn2.to_out.0.": "x_block.attn2.proj.", "attn2.norm_q.": "x_block.attn2.ln_q.", "attn2.norm_k.": "x_block.attn2.ln_k.",
    "ff.net.0.proj.": "x_block.mlp.fc1.", "ff.net.2.": "x_block.mlp.fc2.",
    "ff_context.net.0.proj.": "context_block.mlp.fc1.", "ff_context.net.2.": "context_block.mlp.fc2.",
}
JOINT_FUSED = {f"{ours}{letter}{end}.": f"{theirs}.qkv." for ours, end, theirs in (
    ("attn.to_", "", "x_block.attn"), ("attn.add_", "_proj", "context_block.attn"), ("attn2.to_", "", "x_block.attn2"))
    for letter in "qkv"}


def _mmdit(names: list[str]) -> Placed:
    """SD 3. The norms before the last layer and of the last block's text have shift and scale the other way round."""
    last = max(int(match[1]) for name in names if (match := re.match(r"transformer_blocks\.(\d+)\.", name)))
    for name in names:
        block = re.match(r"transformer_blocks\.(\d+)\.", name)
        rest = name[block.end():] if block else name
        theirs = _start(rest, JOINT | JOINT_FUSED if block else MMDIT)
        turned = rest.startswith("norm1_context.") and int(block[1]) == last if block else rest.startswith("norm_out.")
        how = "fused" if block and _start(rest, JOINT_FUSED) != rest else "swapped" if turned else "same"
        yield name, f"joint_blocks.{block[1]}.{theirs}" if block else theirs, how


def _same(names: list[str], odd: Mapping[str, tuple[str, str]] = {}) -> Placed:
    """CLIP and T5 under the names of transformers, a VAE under those of diffusers; and theirs and how of what is `odd`."""
    yield from ((name, *odd.get(name, (name, "same"))) for name in names)


def _flat_clip(names: list[str]) -> Placed:
    """As some tools merge or save it."""
    yield from ((name, name.removeprefix("text_model."), "same") for name in names)


# CLIP-L in SD 3: what is published does not project its pooled output, and the class of ours does.
UNPROJECTED = {"text_projection.weight": ("", "identity")}
TIED = dict.fromkeys(("shared.weight", "encoder.embed_tokens.weight"), ("shared.weight", "tied"))       # of T5
OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding", "text_model.final_layer_norm.": "ln_final.",
    "text_model.embeddings.token_embedding.": "token_embedding.", "text_projection.weight": "text_projection",
}
OPEN_LAYER = {"layer_norm1.": "ln_1.", "layer_norm2.": "ln_2.", "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj.",
              "self_attn.out_proj.": "attn.out_proj."} | {f"self_attn.{letter}_proj.": "attn.in_proj_" for letter in "qkv"}


def _open_clip(names: list[str]) -> Placed:
    for name in names:
        layer = re.match(r"text_model\.encoder\.layers\.(\d+)\.", name)
        theirs = f"transformer.resblocks.{layer[1]}.{_start(name[layer.end():], OPEN_LAYER)}" if layer else \
            _start(name, OPEN_CLIP)
        how = "fused" if ".in_proj_" in theirs else "transposed" if theirs == "text_projection" else "same"
        yield name, theirs, how


def _linear_open_clip(names: list[str]) -> Placed:
    """As diffusers' scripts/convert_diffusers_to_original_sdxl.py writes it: its projection is that of a linear layer."""
    yield from (row if row[2] != "transposed" else (row[0], row[0], "same") for row in _open_clip(names))


KINDS: dict[str, Callable[[list[str]], Placed]] = {
    "unet": _unet, "mmdit": _mmdit, "vae": _vae, "diffusers_vae": _same, "clip": _same, "flat_clip": _flat_clip,
    "unprojected_clip": partial(_same, odd=UNPROJECTED), "t5": partial(_same, odd=TIED),
    "open_clip": _open_clip, "linear_open_clip": _linear_open_clip,
}
# What files hold beside a table's tensors and nobody needs: buffers, the temperature of the contrastive loss, a tied copy.
NEEDLESS = re.compile(r"(^|\.)(position_ids|logit_scale|attn_mask|encoder\.embed_tokens\.weight)$|^loss\.")
# What the original has and a model of ours has not: SD 2 takes the last layer but one, and SD 1 to 3 project only where said.
DROPPED = re.compile(r"^transformer\.resblocks\.\d+\.|(^|\.)text_projection(\.weight)?$")


def _start(name: str, table: Mapping[str, str]) -> str:
    """The name with the one start of it that the table has replaced."""
    return next((new + name[len(old):] for old, new in table.items() if name.startswith(old)), name)
