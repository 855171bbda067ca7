"""How much an adapter changes, layer by layer, and what of it is odd."""

import math
import re
import statistics
from pathlib import Path

from finetune import registry
from finetune.artifact import modules
from finetune.change import core
from finetune.errors import FinetuneError
from finetune.formats.base import load
from finetune.lowrank import factors, norm


def measure(path: Path, facts: dict) -> dict:
    """{"norms": {block: …}, "layers": {layer: …}}, Frobenius norms of the change at strength 1, and with "problems" found."""
    if facts["family"] is None:
        return {"problems": [*facts["problems"], "unknown family: its layers cannot be measured"]}
    try:
        found = modules(load(path, registry.find("families", facts["family"]).SPEC).tensors)
    except FinetuneError as error:
        return {"problems": [*facts["problems"], str(error)]}
    sizes, layers, problems = {}, {}, {}
    for (part, name), module in sorted(found.items(), key=lambda item: _natural(item[0])):
        stem = f"{part}.{name}"
        if {"dora_scale", "oft_blocks"} & module.keys():
            problems.setdefault("depend on the base and are not measured", []).append(stem)
        elif not all(tensor.isfinite().all() for tensor in module.values()):
            problems.setdefault("hold NaN or infinity", []).append(stem)
        elif "lora_A" in module:        # the product of a large layer is not formed
            layers[stem], sizes[stem] = norm(*factors(module)), len(module["lora_B"]) * module["lora_A"][0].numel()
        else:
            change = core(module).double()
            layers[stem], sizes[stem] = change.norm().item(), change.numel()
    usual = statistics.median(layers.values()) if layers else 0.0
    for stem, size in layers.items():
        if size == 0:
            problems.setdefault("change nothing", []).append(stem)
        # No weight of these models is 1 on average.
        elif size > sizes[stem] ** 0.5 or size > 50 * usual > 0:
            problems.setdefault("change far more than weights can bear, or than the others do", []).append(stem)
    squares: dict[str, float] = {}
    for stem, size in layers.items():
        squares[block_of(stem)] = squares.get(block_of(stem), 0.0) + size ** 2
    said = [f"{len(stems)} of {len(found)} modules {what}, such as {stems[0]}" for what, stems in problems.items()]
    return {"norms": {block: math.sqrt(square) for block, square in squares.items()}, "layers": layers,
            "problems": [*facts["problems"], *said]}


def block_of(layer: str) -> str:
    return re.match(r".*?[.][0-9]+|.*", layer)[0]


def _natural(key: tuple[str, str]) -> list:
    return [(int(word), "") if word.isdigit() else (-1, word) for word in ".".join(key).split(".")]
