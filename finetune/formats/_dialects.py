"""The names of an adapter's tensors in the words of every tool, and the one that each has here: `<component>.<path>.<role>`,
with component and path as diffusers has them and a role of `_modules.ROLES`.

    sd-scripts, LyCORIS   lora_unet_down_blocks_0_…, lora_te1_text_model_…, lycoris_…, oft_unet_…, with dots for underscores
    LDM, SGM, SD 3        lora_unet_input_blocks_4_1_…, diffusion_model.joint_blocks.0.…: the blocks of the published code
    diffusers             unet.down_blocks.0.…, transformer.…, text_encoder_2.…, unet.….attn1.processor.to_q_lora.down.weight
    peft                  base_model.model.down_blocks.0.….lora_A.default.weight, or without the front
    OneTrainer, ComfyUI   clip_l.text_model.…, t5.encoder.…, text_encoders.clip_l.transformer.text_model.…
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from finetune.artifact import published
from finetune.errors import FinetuneError
from finetune.families._original import RESNET, moved, unet_places
from finetune.formats import _joint
from finetune.formats._modules import ROLES
from finetune.header import MAX_TENSORS, Header

if TYPE_CHECKING:
    from torch import Tensor

# What may end a name, as a pattern, and the role that it is. `.default` and the like is peft's own.
ENDS = (
    (r"\.lora_A(\.(?!bias)\w+)?(\.weight)?|\.(lora_|lora\.|lora_linear_layer\.)down\.weight", ".lora_A"),
    (r"\.lora_B(\.(?!bias)\w+)?(\.weight)?|\.(lora_|lora\.|lora_linear_layer\.)up\.weight", ".lora_B"),
    (r"\.lora_mid\.weight", ".lora_mid"),
    (r"\.lora_magnitude_vector(\.\w+)?(\.weight)?|\.dora_scale", ".dora_scale"),
    *((rf"\.{role}", f".{role}") for role in (*ROLES, "w_norm", "b_norm") if not role.startswith(("lora_", "dora_"))),
)
NORMS = {"w_norm": "diff", "b_norm": "diff_b"}      # what LyCORIS calls the differences of a norm
LONGEST_END = 80        # characters that are looked at, for names may be long, and many
END = re.compile(rf"(?=\.)(?:{'|'.join(f'(?P<{role[1:]}>{pattern})' for pattern, role in ENDS)})$")
OLD = re.compile(r"(.*?)(\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight")        # diffusers < 0.18
FLAT = re.compile(r"(lora_unet|lora_transformer|lora_te[123]?|lycoris|oft_unet)_([^.]+)")
DOTTED = re.compile(r"(?:(unet|transformer|text_encoder(?:_[23])?|lora_unet|lora_transformer|lora_te[123]?)\."
                    r"|(?:model\.)?diffusion_model\.|(?:text_encoders\.)?(clip_l|clip_g|t5|t5xxl)\.(?:transformer\.)?)?"
                    r"(?:base_model\.model\.)?(.+)")
COMPONENTS = {
    "lora_unet": "unet", "oft_unet": "unet", "lora_transformer": "transformer",
    "lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2", "lora_te3": "text_encoder_3",
    "clip_l": "text_encoder", "clip_g": "text_encoder_2",
    "t5": "text_encoder_3", "t5xxl": "text_encoder_3",
}
# What a path is of that comes without a component, or with the one that many write whatever the denoiser is.
CONTENT = {
    "text_encoder": r"text_model\.",
    "transformer": r"(joint_blocks|transformer_blocks|[txy]_embedder|context_embedder|final_layer|pos_embed|time_text_embed"
                   r"|norm_out|proj_out)\b",
    "unet": r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|conv_norm_out|time_embedding|add_embedding)\b",
}
# A flat name does not say which of its underscores were dots: these are the names between the dots, of the UNets and the
# MM-DiT in diffusers and as they were published, of CLIP and of T5.
SEGMENTS = r"""
    down_blocks mid_block up_blocks attentions resnets downsamplers upsamplers transformer_blocks
    attn attn1 attn2 to_q to_k to_v to_out ff net proj proj_in proj_out norm norm1 norm2 norm3
    conv conv1 conv2 conv_in conv_out conv_shortcut conv_norm_out time_emb_proj
    time_embedding add_embedding class_embedding linear_1 linear_2
    input_blocks middle_block output_blocks time_embed label_emb out in_layers emb_layers out_layers skip_connection op
    add_q_proj add_k_proj add_v_proj to_add_out norm_q norm_k norm_added_q norm_added_k ff_context norm1_context norm_out
    linear pos_embed context_embedder time_text_embed timestep_embedder text_embedder
    joint_blocks x_block context_block qkv ln_q ln_k fc1 fc2 mlp adaLN_modulation final_layer x_embedder t_embedder y_embedder
    text_model encoder layers self_attn q_proj k_proj v_proj out_proj layer_norm1 layer_norm2 final_layer_norm text_projection
    block layer SelfAttention DenseReluDense q k v o wi_0 wi_1 wo layer_norm \d+
""".split()
SEGMENT = re.compile(rf"(?:^|_)({'|'.join(sorted(SEGMENTS, key=len, reverse=True))})(?=_|$)")
# Of a UNet with three levels, SDXL's, and of one with four: they differ in where the upsampler of the first stands.
SGM = unet_places(blocks=3, layers=2, attended={0, 1})
OURS = {theirs: ours for places in (unet_places(blocks=4, layers=2, attended={1, 2, 3}), SGM)
        for ours, theirs in places.items()}
LDM = re.compile(r"(input_blocks|output_blocks|middle_block|time_embed|label_emb|out)\.")


@lru_cache(maxsize=MAX_TENSORS)       # of a file: it is asked for several times
def place(name: str) -> str | None:
    """The name that a tensor of a file has here; None for one that no adapter has."""
    if old := OLD.fullmatch(name):
        layer = f"{old[3]}_proj" if old[1].endswith(".self_attn") else "to_out.0" if old[3] == "out" else f"to_{old[3]}"
        name = f"{old[1]}.{layer}.lora.{old[4]}.weight"
    if not (end := END.search(name, max(0, len(name) - LONGEST_END))):
        return None
    if flat := FLAT.fullmatch(name[:end.start()]):
        said, path = COMPONENTS.get(flat[1]), dotted(flat[2].removeprefix("lora_unet_"))
    elif found := DOTTED.fullmatch(name[:end.start()]):
        said, path = COMPONENTS.get(found[1] or found[2], found[1]), found[3]
    else:
        return None
    path = path and published(from_ldm(path))
    component = said if not path or said not in (None, "unet") else \
        next((component for component, pattern in CONTENT.items() if re.match(pattern, path)), said)
    return f"{component}.{path}.{NORMS.get(end.lastgroup, end.lastgroup)}" if path and component else None


def plain(header: Header) -> Header:
    """The header of the same file under the names of `_dialects`."""
    names = {name: place(name) or name for name in header.tensors}
    return Header({names[name]: facts for name, facts in header.tensors.items()}, header.metadata,
                  {names.get(name, name): value for name, value in header.scalars.items()})


def dotted(flat: str) -> str | None:
    """down_blocks_0_attentions_1 -> down_blocks.0.attentions.1; None for a name outside the table."""
    found = SEGMENT.findall(flat)
    return ".".join(found) if found and "_".join(found) == flat else None


def to_sgm(path: str) -> str:
    """Of SDXL's UNet, in the code that it was published with: so every tool reads kohya's files."""
    return moved(path, SGM)


def from_ldm(path: str) -> str:
    """input_blocks.4.1.proj_in -> down_blocks.1.attentions.0.proj_in, in UNets of two layers to a level: all that were
    published so. Any other path stays as it is."""
    return moved(path, OURS, {theirs: ours for ours, theirs in RESNET.items()}) if LDM.match(path) else path


def translated(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their names here, those of no adapter left out. FinetuneError when two of them have the same."""
    found: dict[str, Tensor] = {}
    rows = []       # peft's magnitudes: of rows, with no other axes
    for name, t in tensors.items():
        ours = place(name)
        if ours in found:
            raise FinetuneError(f"{name!r} and another key both mean {ours!r}")
        if ours is None or name.startswith("oft_unet_") and name.endswith(".alpha"):
            continue
        alpha = tensors.get(f"{name.rpartition('.')[0]}.alpha") if name.startswith("oft_unet_") else None
        found[ours] = t if alpha is None else _constrained(t, alpha)
        rows += [ours] if "lora_magnitude_vector" in name else []
    for name in rows:
        down = found.get(name.replace(".dora_scale", ".lora_A"))
        if down is not None:
            found[name] = found[name].reshape(-1, *[1] * (down.ndim - 1))
    return _joint.split(found)


def _constrained(blocks_knn: Tensor, alpha: Tensor) -> Tensor:
    """The blocks of an OFT of sd-scripts (networks/oft.py) no longer than it lets them be: alpha times the rows."""
    length = (blocks_knn - blocks_knn.mT).float().norm()
    longest = alpha.float() * blocks_knn.shape[0] * blocks_knn.shape[1]
    return (blocks_knn * ((length.minimum(longest) + 1e-8) / (length + 1e-8))).to(blocks_knn.dtype)
