"""A plain LoRA loop: the work of diffusers' `train_text_to_image_lora.py`, in our own words, to be measured against.

    python scripts/reference_loop.py --base DIR --images DIR [--cached] [--steps 6] [--threads 2] [--json FILE]

As that script does, it holds VAE, text encoder and UNet all the time, encodes the picture and its caption in every step, and
trains a LoRA by peft with AdamW (learning rate 1e-4, decay 0.01, norm clipped to 1), accelerate and noise of the DDPM scheduler,
in float32 on the CPU (in bfloat16 with --bf16), and reads the loss in every step.
Other than there: the LoRA is on cross-attention alone unless --targets says `attention`, so that both sides train the same
layers; pictures are resized by Pillow, for torchvision is not installed; and nothing is sampled or logged to a tracker.

`--cached` has the latents' distributions and text states made once, before the first step, and lets the encoders go.
Prints one JSON object: seconds of each step, peak memory in MiB, seconds before the first step.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

BEGIN = time.perf_counter()
TARGETS = {"cross_attention": r".*\.attn2\.(to_q|to_k|to_v|to_out\.0)", "attention": ["to_k", "to_q", "to_v", "to_out.0"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a diffusers folder of SD 1.x or 2.x")
    parser.add_argument("--images", required=True, help="pictures with a metadata.jsonl")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--targets", choices=sorted(TARGETS), default="cross_attention")
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = json.dumps(train(args), indent=1)
    if args.json:
        args.json.write_text(found + "\n", encoding="utf-8")
    print(found)


def train(args) -> dict:
    import torch
    import torch.nn.functional as F
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.training_utils import cast_training_params
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from transformers import CLIPTextModel, CLIPTokenizer

    if args.threads:
        torch.set_num_threads(args.threads)
    accelerator = Accelerator(mixed_precision="bf16" if args.bf16 else "no")
    frozen = torch.bfloat16 if args.bf16 else torch.float32
    torch.manual_seed(0)
    scheduler = DDPMScheduler.from_pretrained(args.base, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(args.base, subfolder="tokenizer")
    text = CLIPTextModel.from_pretrained(args.base, subfolder="text_encoder")
    vae = AutoencoderKL.from_pretrained(args.base, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(args.base, subfolder="unet")
    for part in (text, vae, unet):
        part.requires_grad_(False)
        part.to(accelerator.device, frozen)
    unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian",
                                target_modules=TARGETS[args.targets]))
    cast_training_params(unet, torch.float32)
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)
    loader = torch.utils.data.DataLoader(pictures(args, tokenizer), args.batch, shuffle=True)
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)

    def encode(batch: dict) -> tuple:
        with torch.no_grad():
            return vae.encode(batch["pixels"].to(frozen)).latent_dist, text(batch["tokens"], return_dict=False)[0]

    if args.cached:
        once = [encode(batch) for batch in loader]
        del vae, text
    seconds, loss = [], None
    started = last = time.perf_counter()
    while len(seconds) < args.steps:
        unet.train()
        for latents, states in once if args.cached else map(encode, loader):
            x = latents.sample() * 0.18215
            noise = torch.randn_like(x)
            t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x),), device=x.device)
            with accelerator.accumulate(unet):
                predicted = unet(scheduler.add_noise(x, noise, t), t, states, return_dict=False)[0]
                loss = F.mse_loss(predicted.float(), noise.float())
                accelerator.gather(loss.repeat(args.batch)).mean().item()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            now = time.perf_counter()
            seconds.append(now - last)
            last = now
            if len(seconds) == args.steps:
                break
    cuda = accelerator.device.type == "cuda"
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    peak = torch.cuda.max_memory_allocated() // 2**20 if cuda else int(status["VmHWM"].split()[0]) // 1024
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(accelerator.unwrap_model(unet)))
    with tempfile.TemporaryDirectory() as folder:
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, safe_serialization=True)
    return {"seconds": seconds, "peak_mb": peak, "start_seconds": started - BEGIN, "loss": loss.item(),
            "trained": sum(p.numel() for p in trained), "threads": torch.get_num_threads(), "cached": args.cached}


def pictures(args, tokenizer):
    """Rows of pixels (3, R, R) in [-1, 1] and tokens (77,), made anew at every look."""
    import numpy as np
    import torch
    from datasets import load_dataset
    from PIL import ImageOps

    def seen(rows: dict) -> dict:
        size = args.resolution, args.resolution
        pixels = [torch.from_numpy(np.array(ImageOps.fit(image.convert("RGB"), size))).permute(2, 0, 1) / 127.5 - 1
                  for image in rows["image"]]
        tokens = tokenizer(rows["text"], padding="max_length", truncation=True, max_length=tokenizer.model_max_length,
                           return_tensors="pt").input_ids
        return {"pixels": pixels, "tokens": list(tokens)}

    with tempfile.TemporaryDirectory() as cache:
        return load_dataset("imagefolder", data_dir=args.images, split="train", cache_dir=cache,
                            keep_in_memory=True).with_transform(seen)


if __name__ == "__main__":
    main()
