"""What peft says of an adapter beside its tensors: its LoraConfig, in a file's metadata or in an adapter_config.json."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from finetune.errors import FinetuneError
from finetune.formats._dialects import plain
from finetune.header import Header

MOST_ALPHA = 2 ** 40        # a number of JSON may be larger than any float
MOST_PATTERNS = 16          # with more in them than names: each takes a while with each module,
MOST_NAMES = 16             # and with each dot of its path; no layer has as many
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
            if sum(pattern.count("|") + 1 for pattern in alphas if not _ends(pattern)) > MOST_PATTERNS + 1:
                raise ValueError(f"more than {MOST_PATTERNS} patterns with more in them than names")
            for pattern, alpha in alphas.items():
                # One from outside could take for ever: no groups, and behind the beginning no more than one repetition.
                slow = any(p.removeprefix(".*").count("*") > 1 for p in pattern.split("|"))
                if slow or re.search(r"[^\w.^$|\\*-]", pattern):
                    raise ValueError(f"the pattern {pattern!r}")
                _ends(pattern) or re.compile(pattern)
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


def _ends(pattern: str) -> str | None:
    """What a path ends with, or is behind a ^, that has this pattern; None for one that is more than names."""
    end = pattern.removesuffix("$").replace(r"\.", ".")
    return end if re.fullmatch(r"\^?[\w.-]+", end) else None


def alphas_of(config: dict) -> Callable[[str, int], float]:
    """(path, rank) -> the alpha that peft's config of a part says. The rule is peft's: the first pattern that matches the end
    of the path, from a dot on; names, of which there may be thousands, are looked up."""
    ends, patterns, other = {}, [], config.get("lora_alpha", config.get("alpha"))
    for said in enumerate(config.get("alpha_pattern", {}).items()):
        pattern = said[1][0]
        if end := _ends(pattern):
            ends.setdefault(end, said)
        else:
            either = "|".join(p if p.startswith((".*", "^")) else rf"(.*\.)?{p}" for p in pattern.split("|"))
            patterns.append((re.compile(f"({either})$"), said))

    def alpha(path: str, rank: int) -> float:
        names = path.split(".")
        own = {f"^{path}", *(".".join(names[i:]) for i in range(len(names)))}
        found = [ends[end] for end in own & ends.keys()] + [
            said for regex, said in patterns if len(names) <= MOST_NAMES and regex.match(path)]
        value = min(found)[1][1] if found else rank if other is None else other
        return value * math.sqrt(rank) if config.get("use_rslora") else value

    return alpha
