"""How well a VAE draws pictures again, before and after: what is said at the end of tuning one."""

import json
from dataclasses import dataclass, replace

import torch

from finetune.data.loader import Stream, view_pixels
from finetune.disk import write_text
from finetune.objectives import _similarity as similarity
from finetune.train.preview import resting
from finetune.train.setup import Run


@dataclass(frozen=True)
class Measured:
    pictures: int
    held_out: bool
    before: dict[str, float]        # "psnr" in dB, "ssim" and, where it was trained with, "lpips": means over the pictures
    after: dict[str, float]


def measure(run: Run) -> Measured:
    """On the pictures that are held out; without any, on those that were learned. vae.json keeps the result."""
    stream, network = run.validation or run.loader.streams[0], similarity.lpips() if run.recipe.objective.lpips else None
    after = means(run.family, stream, network)
    with run.method.at(0):
        before = means(run.family, stream, network)
    found = Measured(len(stream.index), run.validation is not None, before, after)
    write_text(run.folder.adapters / "vae.json", json.dumps(vars(found), indent=1) + "\n")
    return found


@torch.no_grad()
def means(family, stream: Stream, network) -> dict[str, float]:
    """Of each picture as it is fitted, unmirrored and from its middle, drawn again from its latent's most likely value."""
    vae, rows = family.parts["vae"], []
    still = replace(stream, view=replace(stream.view, random_crop=False, flip=False, mask=None))
    with resting(family.parts):
        for i in range(len(still.index)):
            x = view_pixels(still.index, i, still.view, still.crop(i, 0), False)[0][None].to(vae.device)
            found = vae.encode(x.to(vae.dtype))
            drawn = vae.decode(found.latents if "latents" in found else found.latent_dist.mode()).sample.float()
            row = {"psnr": similarity.psnr(drawn, x), "ssim": similarity.ssim(drawn, x)}
            if network:
                row["lpips"] = network.to(vae.device)(drawn, x).flatten()
            rows.append({name: value.item() for name, value in row.items()})
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def table(found: Measured) -> str:
    which = "held out" if found.held_out else "that were learned: data.validation holds some out"
    rows = [f"  {name:<6} {found.before[name]:8.4f} → {found.after[name]:8.4f}" for name in found.before]
    return "\n".join([f"  on {found.pictures} pictures {which}", *rows])
