"""Bases of a published model's real size with random weights, for what needs its size and not its pictures.

    python scripts/random_base.py sd15 runs/bench/sd15 [--dtype float16]
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

CONFIGS = Path(__file__).resolve().parent.parent / "finetune" / "assets" / "configs"


def make(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A diffusers folder with the configs that are shipped for this model and weights of a fixed seed; made once."""
    if (folder / "model_index.json").is_file():
        return folder
    import diffusers
    import transformers

    from finetune.families._single import clip_tokenizer
    from finetune.families._source import quiet
    from finetune.families.base import publish_text_encoder

    quiet()
    configs = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    index, staging = configs["model_index"], folder.with_name(f".{folder.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for component, (library, cls) in ((c, k) for c, k in index.items() if isinstance(k, list)):
        torch.manual_seed(0)
        config = configs[component]
        if library == "diffusers":
            part = getattr(diffusers, cls).from_config(config)
        elif "tokenizer" in component:
            part = clip_tokenizer(config)
        else:
            part = getattr(transformers, cls)(transformers.CLIPTextConfig(**config))
        if isinstance(part, torch.nn.Module):
            part.to(dtype)
        part.save_pretrained(staging / component)
        if component.startswith("text_encoder"):
            publish_text_encoder(staging / component)
    (staging / "model_index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return staging.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(path.stem for path in CONFIGS.glob("*.json")))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    args = parser.parse_args()
    print(make(args.name, args.folder, getattr(torch, args.dtype)))


if __name__ == "__main__":
    main()
