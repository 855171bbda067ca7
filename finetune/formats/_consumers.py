"""What other tools make of a file, from its header alone: the proof that it loads cannot run them, but they were measured.

Each row was taken from the tool's own loader in the version named here (tests/formats/test_consumers.py holds the measured
counts against these tables; docs/loaders.md: what was run again, in which version). A row's marks are in the order of TOOLS:

    +  right     x  applied, but by the wrong amount     -  passed over, mostly without a word
    !  the whole file is refused over it                 ?  not examined
"""

import re
from collections import Counter
from dataclasses import dataclass

from finetune.formats._dialects import END
from finetune.header import Header

TOOLS = {"diffusers": "0.42.1", "ComfyUI": "0.3.64 a125cd84", "A1111": "1.10.1 82a973c0", "Forge": "dfdcbab6",
         "SD.Next": "058a7f0c", "InvokeAI": "6.14-alpha 8e71a8a5", "sd-scripts": "48d368fa",
         "stable-diffusion.cpp": "97d29908", "Draw Things": "bfafc68c, read only"}
UNET, LDM = ("sd1", "sd2", "sdxl"), r"lora_unet_(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)_"
# Families (with " alpha", of files that have alphas), the start of a module's name, marks. The first that fits counts.
NAMES = (
    (UNET, r"lora_unet_(conv_in|conv_out|time_embedding_linear_\d)$", "++++++--+"),
    (("sdxl",), r"lora_unet_up_blocks_0_upsamplers_0_conv$", "++-++++++"),
    (UNET, r"lora_unet_((down_blocks|mid_block|up_blocks|add_embedding)_|conv_norm_out$)", "+++++++++"),
    (("sd2",), r"lora_unet_output_blocks_2_1_conv$", "-+++---++"),
    (("sd1",), LDM, "!++++--++"),
    (("sd2",), LDM, "-++++--++"),
    (("sdxl",), LDM, "+++++++++"),
    (("sd1", "sd2"), r"lora_te_text_model_", "+++++++++"),
    (("sd1", "sd2"), r"lora_te1_text_model_", "++++---+?"),
    (("sdxl",), r"lora_te[12]_text_(model|projection)", "+++++++++"),
    (UNET, r"lora_te\d?_(encoder_layers|final_layer_norm)_", "+---+---?"),
    (UNET, r".*\.processor\.to_\w+_lora$", "++-+-!-+?"),
    (UNET, r"unet\..*\.to_(q|k|v|out\.0)$", "+----!-+?"),
    (UNET, r"unet\.", "++---!-+?"),
    (UNET, r"text_encoder(_2)?\.", "++---!--?"),
    (UNET, r"base_model\.model\.", "-----!--?"),
    (UNET, r"(down_blocks|mid_block|up_blocks)\..*\.to_(q|k|v|out\.0)$", "-----!-+?"),
    (UNET, r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding)\b", "-+---!-+?"),
    (UNET, r"oft_unet_", "!--!-!---"),
    (("upscaler",), r"(lora_unet|lora_te|unet|text_encoder)[._]", "+????????"),
    (("sd3",), r"transformer\..*\.attn\.to_(q|k|v|out\.0)$", "+++--!-+?"),
    (("sd3",), r"transformer\.", "++---!-+?"),
    (("sd3",), r"base_model\.model\.", "-+---!--?"),
    (("sd3 alpha",), r"lora_transformer_", "-+!-+!--?"),
    (("sd3 alpha",), r"lora_unet_(joint_blocks|context_embedder|final_layer|pos_embed|x_embedder)", "-+!++!+-?"),
    (("sd3",), r"lora_unet_(joint_blocks|context_embedder|final_layer|pos_embed|x_embedder)", "-+++!!!-?"),
    (("sd3",), r"diffusion_model\.", "-+-+-!-+?"),
)
UNKNOWN = "-----!---"
KINDS = {
    "a LoRA": "+++++++++", "Tucker's core (lora_mid)": "!+++++xxx", "DoRA by columns": "x+++++xxx",
    "DoRA by rows": "xxxx+xxxx", "peft's DoRA": "+xxx+xxxx", "LoHa": "!+++++-++", "LoKr": "!+++++-+-", "OFT": "!++!x!---",
    "differences": "!+++++-++", "norms": "!+++++---", "nothing that it knows": "!--------",
}
# Files of one kind as a whole, by what all of their names fit.
WHOLE = (
    (r"emb_params", "++++++?++"),
    (r"clip_l|clip_g", "-+++++?++"),
    (r"(controlnet_(cond_embedding|(down|mid)_block)|conv_in|time_embedding|add_embedding|down_blocks|mid_block)[.s].*",
     "+????????"),
    (r"(encoder|decoder|quant_conv|post_quant_conv)\.(?!.*(up|down)_blocks|.*mid_block).*", "++++++?+?"),
    (r"(encoder|decoder|quant_conv|post_quant_conv)\..*", "++!+?+?+?"),
)
FORGE_LIMIT = 12        # of keys that it does not know
SEEN_BY_INVOKEAI = re.compile(r"lora_unet_\w+(_attn2_to_[kv]|_time_emb_proj)$|lora_te\w*_self_attn_")
DEEP = re.compile(r"lora_unet_\w+_transformer_blocks_([2-9]|\d\d)_")       # as no UNet's but SDXL's
SEEN_BY_DRAW_THINGS = re.compile(r".*(down_blocks_1_attentions_0|input_blocks_4_1)_transformer_blocks_0_attn2_to_k$")


@dataclass(frozen=True)
class Reading:
    """What a tool makes of a file: how many of its changes are right, and why not all."""

    tool: str
    right: int
    total: int
    outcome: str        # "loads fully", "partially 192/264", "wrongly 0/128", "refused", "ignored"
    why: str


def receipt(header: Header, family: str) -> list[Reading]:
    """What each tool that was examined makes of the file."""
    names = list(header.tensors)
    marks = next((marks for pattern, marks in WHOLE if names and all(re.fullmatch(pattern, name) for name in names)), None)
    if marks is None and len(names) == 1 and "." not in names[0]:      # a token under its own name
        flat = len(header.tensors[names[0]][1]) == 1
        marks = "++++++?++" if names[0] == "emb_params" else "++++x-?++" if flat else "+++++-?++"
    if marks:
        return [_whole(tool, mark) for tool, mark in zip(TOOLS, marks) if mark != "?"]
    found = modules(header)
    marked = [(module, keys, _naming(module, family, header), *_kind(keys, header)) for module, keys in found.items()]
    return [reading for i, tool in enumerate(TOOLS) if (reading := _reading(tool, i, marked, header, family))]


def modules(header: Header) -> dict[str, dict[str, str]]:
    """{module: {role: the tensor's whole name}} in the file's own words; roles are those of `_modules`, or a name's end."""
    found: dict[str, dict[str, str]] = {}
    for name in header.tensors:
        if old := re.fullmatch(r"(.*_lora)\.(down|up)\.weight", name):
            module, role = old[1], {"down": "lora_A", "up": "lora_B"}[old[2]]
        elif end := END.search(name):
            module, role = name[:end.start()], end.lastgroup
        else:
            module, _, role = name.rpartition(".")
        found.setdefault(module, {})[role] = name
    return found


def _naming(module: str, family: str, header: Header) -> str:
    families = {family} | ({f"{family} alpha"} if any(name.endswith(".alpha") for name in header.tensors) else set())
    return next((marks for own, pattern, marks in NAMES if families & set(own) and re.match(pattern, module)), UNKNOWN)


def _kind(keys: dict[str, str], header: Header) -> tuple[str, str]:
    """The kind of change, and its marks."""
    roles, kind = set(keys), "nothing that it knows"
    if "dora_scale" in roles:
        shape = header.tensors[keys["dora_scale"]][1]
        kind = "peft's DoRA" if "magnitude_vector" in keys["dora_scale"] else \
            "DoRA by columns" if len(shape) > 1 and shape[0] == 1 else "DoRA by rows"
    else:
        by_role = {"lora_mid": "Tucker's core (lora_mid)", "lora_A": "a LoRA", "hada_w1_a": "LoHa", "oft_blocks": "OFT",
                   "diff": "differences", "w_norm": "norms"}
        kind = next((kind for role, kind in by_role.items() if role in roles),
                    "LoKr" if any(role.startswith("lokr_w") for role in roles) else kind)
    return kind, KINDS[kind]


def _reading(tool: str, i: int, marked: list, header: Header, family: str) -> Reading | None:
    total, why, outcomes, unknown = len(marked), {}, Counter(), 0
    alphas = Counter(value for name, value in header.scalars.items() if name.endswith(".alpha"))
    mixed = any("lora_A" in name for name in header.tensors) and tool == "diffusers"
    if any(naming[i] == "?" for _, _, naming, _, _ in marked):
        return None
    if tool == "diffusers" and alphas and "lora_adapter_metadata" in header.metadata:
        return Reading(tool, 0, total, "refused", "it takes alphas or lora_adapter_metadata, not both")
    for module, keys, naming, kind, marks in marked:
        mark, about, said = naming[i], naming, f"it does not know names like {module!r}"
        if mark == "+":
            mark, about = marks[i], kind
            said = f"it does not apply {kind} as trained" if mark == "x" else f"it does not know {kind}"
        alpha = header.scalars.get(keys.get("alpha", ""))
        if mark == "+" and mixed and any(".lora.down" in name for name in keys.values()):
            mark, said = "-", "of a file with .lora_A and .lora.down it reads the half that its first name belongs to"
        if mark == "+" and tool == "diffusers" and alpha is not None and "lora_A" in keys \
                and alpha != alphas.most_common(1)[0][0]:
            mark, said = "x", "it gives every module the most frequent alpha"
        rank = next((header.tensors[keys[role]][1][0] for role in ("lora_A", "hada_w1_b") if role in keys), 0)
        if mark == "+" and tool == "stable-diffusion.cpp" and alpha is not None and rank == 1:
            mark, said = "x", "it takes the inputs for the rank where that is 1"      # ggml drops axes of length 1: lora.hpp
        if mark == "!":
            return Reading(tool, 0, total, "refused", said)
        unknown += len(keys) if mark == "-" else 0
        outcomes[mark] += 1
        if mark != "+":
            why.setdefault(about, said)
    probed = [module for module, keys, *_ in marked if keys.keys() & {"lora_A", "hada_w1_a", "lokr_w2", "diff"}]
    if tool == "Forge" and unknown > FORGE_LIMIT:
        return Reading(tool, 0, total, "refused",
                       f"{unknown} of its names are unknown there, and more than {FORGE_LIMIT} are too many")
    if tool == "InvokeAI" and family in UNET and not _seen_by_invokeai(probed, family):
        return Reading(tool, 0, total, "refused",
                       "it recognises a file by attn2 to_k or to_v, or by a text encoder's attention")
    if tool == "Draw Things" and not any(SEEN_BY_DRAW_THINGS.match(module.replace(".", "_")) for module in probed):
        return Reading(tool, 0, total, "refused", "it recognises a file by attn2 to_k of the second level")
    right = outcomes["+"]
    outcome = "loads fully" if right == total else f"wrongly {right}/{total}" if outcomes["x"] else \
        f"partially {right}/{total}" if right else "ignored"
    return Reading(tool, right, total, outcome, "; ".join(why.values()))


def _seen_by_invokeai(probed: list[str], family: str) -> bool:
    """Whether it finds the family: by the first module whose inputs it knows the width of, and resnets' are SDXL's for it. Of
    two text encoders it wants both (6.14.2, model_util.py, lora_token_vector_length; configs/lora.py, _get_base_or_raise)."""
    known = [module for module in probed if SEEN_BY_INVOKEAI.match(module)]
    if family != "sdxl":
        return bool(known) and not known[0].endswith("_time_emb_proj")
    encoders = {module[:8] for module in known if module.startswith("lora_te")}
    return len(encoders) == 2 or any(module.startswith("lora_unet") for module in known) or any(map(DEEP.match, probed))


def _whole(tool: str, mark: str) -> Reading:
    outcome = {"+": "loads fully", "x": "wrongly 0/1", "-": "ignored", "!": "refused"}[mark]
    return Reading(tool, int(mark == "+"), 1, outcome, "" if mark == "+" else "it wants other names in such a file")


def table(readings: list[Reading]) -> str:
    """For people: who loads it whole, and line by line who does not and why."""
    groups: dict[str, list[str]] = {}
    for reading in readings:
        groups.setdefault(f"{reading.outcome}: {reading.why}".removesuffix(": "), []).append(reading.tool)
    whole = ", ".join(groups.pop("loads fully", ["none that was examined"]))
    return "\n        ".join([f"loads fully in {whole}", *(f"{', '.join(names)}: {said}" for said, names in groups.items())])
