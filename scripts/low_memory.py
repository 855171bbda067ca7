"""What a base costs in memory: its parts in few bits, from their shapes, and the peak while one is loaded, beside its size.

    python scripts/low_memory.py            # the published models, without their weights
    python scripts/low_memory.py --load     # a UNet of 271 MiB of random numbers, from a folder and from a single file
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from finetune.artifact import published, write_safetensors
from finetune.families import _original, _single
from finetune.families._quantized import quantize
from finetune.families._source import Source, quiet
from finetune.families.base import DTYPES

CONFIGS = Path(_single.ASSETS) / "configs"
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def size(module: torch.nn.Module) -> float:
    return sum(t.nbytes for t in module.state_dict().values()) / 2**20


def sizes() -> None:
    import diffusers
    import transformers

    print(f"{'MiB':<28} {'bfloat16':>9} {'int8':>9} {'nf4':>9}")
    for name in ("sd15", "sd21", "sdxl", "sd3-medium", "sd35-large"):
        configs = json.loads((CONFIGS / f"{name}.json").read_text())
        for part in (part for part in PARTS if part in configs):
            library, cls = configs["model_index"][part]
            row = []
            for kind in (None, "int8", "nf4"):
                known = getattr({"diffusers": diffusers, "transformers": transformers}[library], cls)
                module = _single.empty(known, configs[part])
                module.to(torch.bfloat16)
                if kind:
                    quantize(module, kind)
                row.append(size(module))
            print(f"{name + ' ' + part:<28} " + " ".join(f"{number:9.0f}" for number in row), flush=True)


def make(where: Path) -> None:
    import diffusers

    config = json.loads((CONFIGS / "sd15.json").read_text())["unet"]
    unet = diffusers.UNet2DConditionModel.from_config(config | {"block_out_channels": [160, 320, 480, 480]}).half()
    unet.save_pretrained(where / "unet")
    ours = {published(name): t for name, t in unet.state_dict().items()}
    write_safetensors(where / "one.safetensors", dict(_original.write(ours, _original.rows("unet", ours))), {})


def anonymous() -> float:
    """Memory of this process that is no file's, in MiB."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("RssAnon")) / 1024


def loaded(where: Path, how: str, dtype: torch.dtype) -> None:
    import diffusers

    cls, source = diffusers.UNet2DConditionModel, Source(str(where), None, None, {})
    config, start, peak, done = source.config("unet"), anonymous(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous() - start)
            time.sleep(0.003)

    thread = threading.Thread(target=watch)
    thread.start()
    module = source.load(cls, "unet", dtype) if how == "folder" else \
        _single.load(str(where / "one.safetensors"), ("unet", ""), cls, config, dtype)
    done.set()
    thread.join()
    print(f"{how:<7} {str(dtype):<15} {size(module):5.0f} MiB; at the peak {peak:5.0f}, at the end {anonymous() - start:5.0f}")


if __name__ == "__main__":
    quiet()
    if sys.argv[1:] == ["--load"]:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder))
            for dtype in ("float16", "bfloat16", "float32"):
                for how in ("folder", "file"):
                    subprocess.run([sys.executable, __file__, folder, how, dtype], check=True, env=os.environ)
    elif sys.argv[1:]:
        loaded(Path(sys.argv[1]), sys.argv[2], DTYPES[sys.argv[3]])
    else:
        sizes()
