"""merge, extract, resize, inspect and train at the size of SD 1.5, on random weights: time and memory.

    python -m pytest tests/commands/test_tools_at_size.py -m slow -s
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.families._source import TINY

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 6.0     # GiB of memory, all pages of mapped files counted

MAKE = """
import json, sys
from pathlib import Path
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel
from finetune import registry
from finetune.artifact import Artifact, published, write_safetensors
from finetune.formats import base as formats

folder, vocabulary = Path(sys.argv[1]), int(sys.argv[2])
with torch.device("meta"):
    unet = UNet2DConditionModel(cross_attention_dim=768)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=vocabulary, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                        num_attention_heads=12))
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4,
                        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2)
lora = {}
for module, part, component, file in ((unet, "denoiser", "unet", "diffusion_pytorch_model"),
                                      (text, "text", "text_encoder", "model"),
                                      (vae, "", "vae", "diffusion_pytorch_model")):
    path = folder / component
    path.mkdir()
    (path / "config.json").write_text(module.to_json_string() if part != "text" else module.config.to_json_string())
    drawn = {published(name): torch.randn(t.shape) * 0.02 for name, t in module.state_dict().items()}
    write_safetensors(path / f"{file}.safetensors", drawn, {"format": "pt"})
    for name, layer in module.named_modules() if part else ():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            out, *inner = layer.weight.shape
            lora |= {f"{part}.{published(name)}.lora_A": torch.randn(32, *inner) * 0.02,
                     f"{part}.{published(name)}.lora_B": torch.randn(out, 32, *[1] * (len(inner) - 1)) * 0.02,
                     f"{part}.{published(name)}.alpha": torch.tensor(32.0)}
formats.save(Artifact("lora", "sd1", lora, {}), folder / "lora.safetensors", "kohya", registry.find("families", "sd1").SPEC)
"""


def call(*words, limit: float = LIMIT) -> tuple[str, float]:
    """(what it printed, seconds) of `finetune`, within the limit."""
    begin, (read, write) = time.perf_counter(), os.pipe()
    process = subprocess.Popen([sys.executable, *map(str, words)], stdout=write)
    os.close(write)
    with open(read) as said:
        text = said.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds, memory = time.perf_counter() - begin, usage.ru_maxrss / 2**20
    print(f"{' '.join(map(str, words[2:4])):.60}: {seconds:.0f} s, {memory:.2f} GiB, exit {process.returncode}", flush=True)
    assert process.returncode == 0 and memory < limit
    return text, seconds


@pytest.mark.slow
def test_within_six_gigabytes(tmp_path):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    base.mkdir()
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(TINY / name, base / name)
    shutil.copy(TINY / "model_index.json", base)
    vocabulary = json.loads((TINY / "text_encoder" / "config.json").read_text())["vocab_size"]
    subprocess.run([sys.executable, "-c", MAKE, str(base), str(vocabulary)], check=True)
    lora, sized = base / "lora.safetensors", tmp_path / "small.safetensors"
    finetune = ("-m", "finetune")
    call(*finetune, "merge", "--base", base, "--adapter", lora, "--out", tuned)
    text, _ = call(*finetune, "extract", "--base", base, "--tuned", tuned, "--rank", 32,
                   "--json", "--out", tmp_path / "x.safetensors",
                   "--dtype", "float32")
    found = json.loads(text)
    print(len(found["layers"]), "layers, error", found["error"], "worst", found["worst"])
    assert found["error"] < 1e-2        # what the float16 of the merged model leaves of a change as large as its weights
    call(*finetune, "resize", tmp_path / "x.safetensors", "--energy", 0.9, "--out", sized)
    call(*finetune, "merge", "--adapter", lora, "--adapter", sized, "--out", tmp_path / "both.safetensors")
    call(*finetune, "merge", "--adapter", lora, "--adapter", sized, "--rank", 16, "--out", tmp_path / "both16.safetensors")
    text, _ = call(*finetune, "inspect", sized)
    print(text)


@pytest.mark.slow
def test_two_steps_at_256_pixels_within_eight_gigabytes(pictures, tmp_path):
    """The base is made once, where scripts/bench.py has it too."""
    base, limit = ROOT / "runs" / "bench" / "sd15", 8e9 / 2**30
    call(ROOT / "scripts" / "random_base.py", "sd15", base, limit=limit)
    words = [f"base.path={base}", "base.variant=null", "base.dtype=float32", f"data.images={pictures}", "data.resolution=256",
             "train.max_steps=2", "train.warmup_steps=0", "train.mixed_precision='no'", "train.batch_size=1",
             "every.preview=0"]
    call("-m", "finetune", "train", ROOT / "recipes" / "sd15_lora_style_8gb.yaml", "--run", tmp_path / "run",
         *(part for word in words for part in ("--set", word)), limit=limit)
    found = json.loads((tmp_path / "run" / "adapter" / "verify.json").read_text())
    assert found and all(check["passed"] for checks in found.values() for check in checks)
