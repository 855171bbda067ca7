"""A checked recipe as text and as the part of a run's identity that it decides."""

import io
from collections.abc import Iterator, Mapping
from contextlib import suppress
from hashlib import sha256

from ruamel.yaml import YAML

from finetune.artifact import weights_of
from finetune.recipe.schema import Recipe


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults written out; loading it again gives an equal Recipe."""
    return written(recipe.model_dump(mode="json"))


def written(words: dict) -> str:
    """A recipe's words as YAML, in the schema's order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False       # the schema's order
    yaml.allow_unicode = True
    text = io.StringIO()
    yaml.dump(words, text)
    return text.getvalue()


def training_part(recipe: Recipe) -> dict:
    """What decides the trained numbers, as plain JSON values: all but what is watched, kept and written.

    Where base and pictures lie and which are left out is not in it, because the run hashes the content; nor `train.threads`,
    because what matters is how many it really used. What a method starts from is told by its hash."""
    part = recipe.model_dump(mode="json", exclude={
        "preview": True, "every": True, "export": True,
        "data": {"images": True, "unreadable": True, "validation": True, "workers": True, "condition": True,
                 "mask": {"source"}, "inpaint": {"masks"}, "prior": {"images"}},
        "base": {"path", "revision", "variant", "adapters", "denoiser", "text", "text_2", "text_3", "vae"},
        "train": {"keep_checkpoints", "keep_every", "keep_best", "patience", "max_time", "threads", "trackers"}})
    for method in part["method"]:
        if start := method.get("start_from"):
            with suppress(OSError):     # whoever opens it will say so
                method["start_from"] = sha256(weights_of(start).read_bytes()).hexdigest()
    return part


def difference(old: Mapping, new: Mapping) -> list[str]:
    """What differs between two trees of plain values: `train.learning_rate: 0.0001 -> 0.0003`."""
    before, after = dict(leaves(old)), dict(leaves(new))
    return [f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}" for key in {**before, **after}
            if key not in before or key not in after or before[key] != after[key]]


def leaves(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping) and value:
        inner = value.items()
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        inner = enumerate(value)
    else:
        yield key, value
        return
    for name, item in inner:
        yield from leaves(item, f"{key}.{name}" if key else str(name))
