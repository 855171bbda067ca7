"""The names that other tools write, said in those of `kohya` and `diffusers`, which `base.load` then finds a reader for.

    sd-scripts, ComfyUI   lora_unet_input_blocks_4_1_…, diffusion_model.input_blocks.4.1.…   the blocks of LDM
    LyCORIS               lycoris_down_blocks_0_…                                             its wrapper of any model
    sd-scripts OFT        oft_unet_…                                                          with its constraint applied
    diffusers < 0.18      unet.….attn1.processor.to_q_lora.down.weight
    peft                  base_model.model.down_blocks.0.….lora_A.default.weight, or without the front
    OneTrainer (OMI)      unet.input_blocks.4.1.…, clip_l.text_model.…, text_encoders.clip_l.transformer.… of ComfyUI

A name that is none of these stays as it is: whether anything reads it, the formats decide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from finetune.errors import FinetuneError
from finetune.formats._modules import ROLES

if TYPE_CHECKING:
    from torch import Tensor

# What may end a dotted name, as a pattern, and what it is in the words of diffusers. `.default` and the like is peft's own.
ENDS = (
    (r"\.lora_A(\.\w+)?(\.weight)?|\.(lora_|lora\.|lora_linear_layer\.)down\.weight", ".lora_A.weight"),
    (r"\.lora_B(\.\w+)?(\.weight)?|\.(lora_|lora\.|lora_linear_layer\.)up\.weight", ".lora_B.weight"),
    (r"\.lora_mid\.weight", ".lora_mid"),
    (r"\.lora_magnitude_vector(\.\w+)?(\.weight)?|\.dora_scale", ".dora_scale"),
    *((rf"\.{role}", f".{role}") for role in ROLES if not role.startswith(("lora_", "dora_"))),
)
# What may begin one, in this order.
LDM = r"(?:(?:input|output)_blocks|middle_block|time_embed|label_emb|out)\."
UNET = r"(?:(?:down|up)_blocks|mid_block|conv_(?:in|out)|(?:time|add)_embedding)\."
BEGINS = (
    (r"(?:unet\.|text_encoder\.)?base_model\.model\.", ""),
    (r"(?:text_encoders\.)?clip_l\.(?:transformer\.)?", "text_encoder."),
    (r"(?:text_encoders\.)?clip_g\.(?:transformer\.)?", "text_encoder_2."),
    (rf"(?:model\.)?diffusion_model\.(?={LDM}|{UNET})|(?={LDM}|{UNET})", "unet."),
    (r"(?=(?:text_model\.)?(?:encoder\.layers|final_layer_norm)\.)", "text_encoder."),
)
OLD = re.compile(r"(.*?)(\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight")
RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
          "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
SINGLE = {"input_blocks.0.0": "conv_in", "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
          "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2", "out.0": "conv_norm_out",
          "out.2": "conv_out"}


def renamed(names: Iterable[str]) -> dict[str, str]:
    """{name: the same in the words of kohya or diffusers}."""
    return {name: _flat(name) if re.match(r"(lora|lycoris|oft)_\w+\.", name) else _dotted(name) for name in names}


def translated(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under such names. FinetuneError when two of them have the same."""
    found: dict[str, Tensor] = {}
    for name, ours in renamed(tensors).items():
        t, stem = tensors[name], name.rpartition(".")[0]
        if name.startswith("oft_unet_"):
            if name.endswith(".alpha"):
                continue
            t = _constrained(t, tensors[f"{stem}.alpha"]) if f"{stem}.alpha" in tensors else t
        if ours in found:
            raise FinetuneError(f"{name!r} and another key both mean {ours!r}")
        found[ours] = t
    for name in [name for name in tensors if "lora_magnitude_vector" in name]:      # peft's: of rows, with no other axes
        stem = renamed([name])[name].removesuffix(".dora_scale")
        down = next((found[f"{stem}{end}"] for end in (".lora_A.weight", ".lora_down.weight") if f"{stem}{end}" in found), None)
        if down is not None:
            found[f"{stem}.dora_scale"] = tensors[name].reshape(-1, *[1] * (down.ndim - 1))
    return found


def _constrained(blocks_knn: Tensor, alpha: Tensor) -> Tensor:
    """The blocks of an OFT of sd-scripts (networks/oft.py) no longer than it lets them be: alpha times the rows."""
    length = (blocks_knn - blocks_knn.mT).float().norm()
    longest = alpha.float() * blocks_knn.shape[0] * blocks_knn.shape[1]
    return (blocks_knn * ((length.minimum(longest) + 1e-8) / (length + 1e-8))).to(blocks_knn.dtype)


def _flat(name: str) -> str:
    module, dot, role = name.partition(".")
    module = re.sub(r"^lycoris_(?=text_model_|encoder_layers_)", "lora_te_", module)
    module = re.sub(r"^(lycoris_|oft_unet_)(lora_unet_)?", "lora_unet_", module)
    start, path = module[:10], module[10:]
    return (start + (from_ldm(path, "_") or path) if start == "lora_unet_" else module) + dot + role


def _dotted(name: str) -> str:
    if old := OLD.fullmatch(name):
        inside, letter = old[1], old[3]
        text = inside.endswith(".self_attn")
        layer = f"{letter}_proj" if text else "to_out.0" if letter == "out" else f"to_{letter}"
        name = f"{inside}.{layer}.lora_{'A' if old[4] == 'down' else 'B'}.weight"
    end, ours = next(((end, ours) for pattern, ours in ENDS if (end := re.search(rf"(?:{pattern})$", name))), (None, ""))
    if not end:
        return name
    path = f"{name[:end.start()]}."
    for pattern, begin in BEGINS:
        path = re.sub(rf"^(?:{pattern})", begin, path)
    part, _, path = path[:-1].partition(".")
    return f"{part}.{part == 'unet' and from_ldm(path, '.') or path}{ours}" if path else name


def from_ldm(path: str, dot: str) -> str | None:
    """input_blocks.4.1.proj_in → down_blocks.1.attentions.0.proj_in, in UNets of two layers to a level: all that were
    published under LDM's names. `dot` is what stands between names. None for what is no such name."""
    for theirs, ours in SINGLE.items():
        if path == theirs.replace(".", dot):
            return ours.replace(".", dot)
    between = re.escape(dot)
    found = re.fullmatch(rf"(?:(input|output)_blocks{between}(\d+)|middle_block){between}([012]){between}(.+)", path)
    if not found:
        return None
    side, place, rest = found[1], int(found[3]), found[4]
    level, layer = divmod(int(found[2]) - (side == "input"), 3) if side else (0, place // 2)
    block = {"input": f"down_blocks.{level}", "output": f"up_blocks.{level}", None: "mid_block"}[side]
    if rest in ("op", "conv"):
        return f"{block}.{'down' if side == 'input' else 'up'}samplers.0.conv".replace(".", dot)
    if place == 1:
        return f"{block}.attentions.{layer if side else 0}.".replace(".", dot) + rest
    own = next((ours for theirs, ours in RESNET.items() if rest == theirs.replace(".", dot)), None)
    return f"{block}.resnets.{layer}.{own}".replace(".", dot) if own else None
