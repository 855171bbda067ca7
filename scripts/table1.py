"""Train every row of Table 1 of the Stable Diffusion 3 paper (Esser et al. 2024, arXiv 2403.03206) for a moment.

    python scripts/table1.py                # about five minutes on one CPU core; writes docs/table1.md

A UNet in the tiny base's shapes starts from the same random weights in each row and learns datasets/style, with the same
draws. What it shows is that each formulation trains; the rank is the paper's, of big models, and these losses are of
different things. `objective` is a recipe's: --set objective="…" trains it with any recipe.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from finetune import registry
from finetune.batch import Batch, Conditioning
from finetune.diffusion import noise
from finetune.recipe import load

ROOT = Path(__file__).resolve().parent.parent
STEPS, BATCH, SIDE, RATE = 200, 4, 32, 1e-3

# row → (rank over all, objective). A fraction f is σ = f / (1 − f) for edm, so its schedules are laws: uniform f has the σ
# of rf, cosmap that of cos. "linear" is LDM's, linear in √β.
ROWS = {
    "rf/lognorm(0.00, 1.00)": (1.54, "{path: rf, timesteps: {kind: logit_normal, mean: 0.0, scale: 1.0}}"),
    "rf/lognorm(1.00, 0.60)": (2.08, "{path: rf, timesteps: {kind: logit_normal, mean: 1.0, scale: 0.6}}"),
    "rf/lognorm(0.50, 0.60)": (2.71, "{path: rf, timesteps: {kind: logit_normal, mean: 0.5, scale: 0.6}}"),
    "rf/mode(1.29)": (2.75, "{path: rf, timesteps: {kind: mode, scale: 1.29}}"),
    "rf/lognorm(0.50, 1.00)": (2.83, "{path: rf, timesteps: {kind: logit_normal, mean: 0.5, scale: 1.0}}"),
    "eps/linear": (2.88, "{path: {kind: ddpm, schedule: scaled_linear, prediction: epsilon}}"),
    "rf/mode(1.75)": (3.33, "{path: rf, timesteps: {kind: mode, scale: 1.75}}"),
    "rf/cosmap": (4.13, "{path: rf, timesteps: cosmap}"),
    "edm(0.00, 0.60)": (5.63, "{path: edm, timesteps: {kind: log_normal, mean: 0.0, scale: 0.6}}"),
    "rf": (5.67, "{path: rf}"),
    "v/linear": (6.83, "{path: {kind: ddpm, schedule: scaled_linear, prediction: v_prediction}}"),
    "edm(0.60, 1.20)": (9.00, "{path: edm, timesteps: {kind: log_normal, mean: 0.6, scale: 1.2}}"),
    "v/cos": (9.17, "{path: {kind: ddpm, schedule: cosine, prediction: v_prediction}}"),
    "edm/cos": (11.04, "{path: edm, timesteps: cosmap}"),
    "edm/rf": (13.04, "{path: edm, timesteps: uniform}"),
    "edm(-1.20, 1.20)": (15.58, "{path: edm, timesteps: {kind: log_normal, mean: -1.2, scale: 1.2}}"),
}


def objective(words: str):
    """The objective of a recipe with these words in it."""
    found = load(ROOT / "recipes" / "quickstart.yaml", [f"objective={words}"]).recipe.objective
    fields = found.model_dump(exclude={"kind"}, exclude_none=True)
    return registry.find("objectives", found.kind).build(**fields, step_size=BATCH)


@torch.no_grad()
def style(family) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (N, C, h, w) and text states (N, L, D) of datasets/style."""
    folder = ROOT / "datasets" / "style"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pictures = [Image.open(folder / row["file_name"]).convert("RGB") for row in rows]
    pictures = [picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS) for picture in pictures]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    moments = family.moments(pixels)
    means = family.latents(moments, torch.zeros_like(moments.chunk(2, 1)[0]))
    return means, family.encode_text([row["text"] for row in rows]).tokens


def train(family, words: str, latents: torch.Tensor, tokens: torch.Tensor, steps: int) -> list[float]:
    """The loss of each step."""
    from diffusers import UNet2DConditionModel

    loss_of, count = objective(words), len(latents)
    torch.manual_seed(0)
    unet = family.parts["denoiser"] = UNet2DConditionModel.from_config(family.parts["denoiser"].config)
    optimizer, losses = torch.optim.AdamW(unet.parameters(), RATE), []
    for step in range(steps):
        positions = list(range(step * BATCH, (step + 1) * BATCH))
        chosen = [int(noise.permutation(count, 0, p // count, "order")[p % count]) for p in positions]
        geometry = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * BATCH)
        batch = Batch(positions, [""] * BATCH, torch.ones(BATCH), 1 / BATCH, geometry,
                      latents=latents[chosen], conditioning=Conditioning(tokens[chosen]))
        loss = loss_of(family, batch, 0).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> int:
    family = registry.find("families", "sd1").load("tiny")
    latents, tokens = style(family)
    lines, failed = [], []
    for row, (rank, words) in ROWS.items():
        begin, losses = time.process_time(), np.array(train(family, words, latents, tokens, STEPS))
        first, last = losses[:STEPS // 5].mean(), losses[-STEPS // 5:].mean()
        if not (np.isfinite(losses).all() and last < first):
            failed.append(row)
        lines.append(f"| {row} | {rank:.2f} | {first:.3f} | {last:.3f} | {last / first:.2f} | `{words}` |")
        print(f"{row:<24} {first:8.3f} {last:8.3f} {last / first:6.2f}   {time.process_time() - begin:4.0f} s", flush=True)
    if failed:
        print(f"not finite, or not falling: {', '.join(failed)}")
        return 1
    text = "\n".join([
        "# Table 1 of the Stable Diffusion 3 paper, as recipes", "",
        *__doc__.strip().splitlines()[4:], "",
        f"Written by `python scripts/table1.py`: {STEPS} steps of {BATCH} pictures at {SIDE} px, AdamW at {RATE:g}. first and last:",
        "the mean loss of that fifth of the steps.", "",
        "| row | rank in the paper | first | last | last / first | objective |", "|---|---|---|---|---|---|", *lines, ""])
    (ROOT / "docs" / "table1.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
