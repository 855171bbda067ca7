"""What peft says of an adapter beside its tensors: its LoraConfig, in a file's metadata or in an adapter_config.json."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from finetune.artifact import Header
from finetune.errors import FinetuneError
from finetune.formats._dialects import plain

MOST_ALPHA = 2 ** 40        # a number of JSON may be larger than any float
DIFFUSERS_METADATA = "lora_adapter_metadata"  # peft's config, for diffusers: fatal in a file that has alphas


def peft_configs(metadata: Mapping[str, str]) -> dict[str, dict]:
    """{component: peft's LoraConfig as a dict} from a file's metadata. FinetuneError if it makes no sense."""
    try:
        configs: dict[str, dict] = {}
        for key, value in json.loads(metadata.get(DIFFUSERS_METADATA, "{}")).items():
            component, _, field = key.partition(".")
            configs.setdefault(component, {})[field] = value
        for config in configs.values():
            if not (isinstance(config.get("r", 1), int) and isinstance(config.get("rank_pattern", {}), dict)):
                raise TypeError("a rank that is no number")
            alphas = config.get("alpha_pattern", {}) | {"": config.get("lora_alpha", config.get("alpha", 1))}
            for pattern, alpha in alphas.items():
                if re.search(r"[^\w.^$|()\\*-]", pattern) or pattern.count("*") > 2 or "(" in pattern:
                    raise ValueError(f"the pattern {pattern!r}")        # one from outside that could take for ever
                re.compile(pattern)
                if not (isinstance(alpha, (int, float)) and abs(alpha) <= MOST_ALPHA):
                    raise TypeError(f"an alpha of {alpha!r}")
    except (ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise FinetuneError(f"its {DIFFUSERS_METADATA} is not what diffusers writes: {error}") from error
    return configs


def beside(path: Path, header: Header) -> dict[str, str]:
    """What peft says of its adapter_model.safetensors in a file beside it: its alpha, above all."""
    config = path.with_name("adapter_config.json")
    if path.name != "adapter_model.safetensors" or not config.is_file():
        return {}
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
        parts = {name.partition(".")[0] for name in plain(header).tensors}
        said = {f"{part}.{key}": value for part in sorted(parts) for key, value in fields.items()}
        return {DIFFUSERS_METADATA: json.dumps(said)}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise FinetuneError(f"its {config.name} cannot be read: {error}") from None


def alpha_of(config: dict, path: str, rank: int) -> float:
    """What peft's config of a part says; the rule is peft's."""
    patterns = config.get("alpha_pattern", {}).items()
    matching = (value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", path))
    value = next(matching, config.get("lora_alpha", config.get("alpha", rank)))
    return value * math.sqrt(rank) if config.get("use_rslora") else value
