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
KOHYA_ENDS = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight", ".lora_mid": ".lora_mid.weight"}
# What may begin one, in this order. `ldm.` is not of diffusers: see `_dotted`.
LDM = r"(?:(?:input|output)_blocks|middle_block|time_embed|label_emb|out)\."
BEGINS = (
    (r"(?:unet\.|text_encoder\.)?base_model\.model\.", ""),
    (r"(?:text_encoders\.)?clip_l\.(?:transformer\.)?", "text_encoder."),
    (r"(?:text_encoders\.)?clip_g\.(?:transformer\.)?", "text_encoder_2."),
    (rf"(?:model\.)?diffusion_model\.|(?:unet\.)?(?={LDM})", "ldm."),
    (r"(?=(?:(?:down|up)_blocks|mid_block|conv_(?:in|out)|(?:time|add)_embedding)\.)", "unet."),
    (r"(?=(?:text_model\.)?(?:encoder\.layers|final_layer_norm)\.)", "text_encoder."),
)
OLD = re.compile(r"(.*?)(\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight")
RESNET = {"in_layers_0": "norm1", "in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_0": "norm2",
          "out_layers_3": "conv2", "skip_connection": "conv_shortcut"}
SINGLE = {"input_blocks_0_0": "conv_in", "time_embed_0": "time_embedding_linear_1", "time_embed_2": "time_embedding_linear_2",
          "label_emb_0_0": "add_embedding_linear_1", "label_emb_0_2": "add_embedding_linear_2", "out_0": "conv_norm_out",
          "out_2": "conv_out"}


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
    return (start + (from_ldm(path) or path) if start == "lora_unet_" else module) + dot + role


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
    path = path[:-1]
    if path.startswith("ldm."):
        flat = path.removeprefix("ldm.").replace(".", "_")
        return f"lora_unet_{from_ldm(flat) or flat}{KOHYA_ENDS.get(ours, ours)}"
    return path + ours


def from_ldm(flat: str) -> str | None:
    """input_blocks_4_1_proj_in → down_blocks_1_attentions_0_proj_in, in UNets of two layers to a level: all that were
    published under LDM's names. None for what is no such name."""
    if flat in SINGLE:
        return SINGLE[flat]
    if found := re.fullmatch(r"middle_block_([012])_(.+)", flat):
        number, rest = int(found[1]), found[2]
        return f"mid_block_attentions_0_{rest}" if number == 1 else _resnet(f"mid_block_resnets_{number // 2}", rest)
    if not (found := re.fullmatch(r"(input|output)_blocks_(\d+)_([012])_(.+)", flat)):
        return None
    down, index, place, rest = found[1] == "input", int(found[2]), int(found[3]), found[4]
    level, layer = divmod(index - down, 3)
    block = f"{'down' if down else 'up'}_blocks_{level}"
    if rest in ("op", "conv"):
        return f"{block}_{'down' if down else 'up'}samplers_0_conv"
    return f"{block}_attentions_{layer}_{rest}" if place == 1 else _resnet(f"{block}_resnets_{layer}", rest)


def _resnet(block: str, rest: str) -> str | None:
    return f"{block}_{RESNET[rest]}" if rest in RESNET else None
