"""Attribute readers: small networks that say what a picture of one thing shows.

A reader is trained from nothing on fresh drawings whose truth is known, plain ones only or of every style,
and is as good as its accuracy on drawings that it has never seen. Its training pictures are spoilt a little, the
way that a VAE and a sampler spoil theirs. Once trained, it is kept in `runs/readers/`.
"""

import hashlib
import random
from pathlib import Path

import drawings
import numpy as np
import torch
import torch.nn.functional as F
import world
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "runs" / "readers"
DRAWINGS, HELD_OUT, STEPS, BATCH = 10_000, 2_000, 1_500, 64
HEADS = {"shape": world.SHAPES, "colour": tuple(world.COLOURS), "background": tuple(world.BACKGROUNDS),
         "style": tuple(drawings.STYLES)}


class Reader(nn.Module):
    """Pictures (B, 3, 64, 64) in [0, 1] → head → logits (B, words of the head)."""

    def __init__(self, heads: list[str]):
        super().__init__()

        def block(wide: int, out: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(wide, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]

        self.body = nn.Sequential(*block(3, 24, 2), *block(24, 48, 2), *block(48, 64, 1), *block(64, 96, 2),
                                  *block(96, 96, 1))
        self.heads = nn.ModuleDict({head: nn.Linear(192, len(HEADS[head])) for head in heads})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x - 0.5)
        h = torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1)      # what there is, wherever it is
        return {name: head(h) for name, head in self.heads.items()}


def tensor(pictures: list[Image.Image]) -> Tensor:
    """(N, 3, 64, 64) in [0, 1]."""
    return torch.from_numpy(np.stack([np.array(p) for p in pictures])).permute(0, 3, 1, 2).float() / 255


def truth(scene: world.Scene, style: str = "plain") -> dict[str, str]:
    return {"shape": scene.things[0].shape, "colour": scene.things[0].colour, "background": scene.background,
            "style": style}


def fresh(count: int, styles: bool, stream: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Drawings of one thing and, for each head, the index of the right word."""
    rng = random.Random(stream)
    scenes = [world.random_scene(rng, two=0) for _ in range(count)]
    drawn = [rng.choice(HEADS["style"]) if styles else "plain" for _ in scenes]
    x = tensor([drawings.STYLES[style](scene) for scene, style in zip(scenes, drawn)])
    truths = [truth(s, d) for s, d in zip(scenes, drawn)]
    return x, {head: torch.tensor([words.index(t[head]) for t in truths]) for head, words in HEADS.items()}


def spoil(x: Tensor, gen: torch.Generator) -> Tensor:
    """Coarser, noisy, in slightly other light, and blotched at the grain of the VAE's latents."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen)

    size, amount = x.shape[-1], torch.rand(len(x), 1, 1, 1, generator=gen)
    coarse = int(torch.randint(size // 4, size + 1, (), generator=gen))
    blurred = F.interpolate(F.interpolate(x, size=coarse, mode="area"), size=size, mode="bicubic")
    x = x.lerp(blurred, amount)
    light = (1 + 0.06 * noise(len(x), 1, 1, 1)) * (1 + 0.03 * noise(len(x), 3, 1, 1))
    blotches = F.interpolate(noise(len(x), 3, size // 4, size // 4), size=size, mode="bilinear")
    return (x * light + 0.05 * amount * blotches + 0.03 * amount * noise(*x.shape)).clamp(0, 1)


@torch.no_grad()
def predict(reader: Reader, x: Tensor) -> dict[str, Tensor]:
    """The index of the word that each head reads."""
    parts = [reader(part) for part in x.split(256)]
    return {head: torch.cat([p[head].argmax(1) for p in parts]) for head in reader.heads}


def read(reader: Reader, pictures: list[Image.Image]) -> list[dict[str, str]]:
    """Head → word, for each picture."""
    found = predict(reader, tensor(pictures))
    return [{head: HEADS[head][indices[i]] for head, indices in found.items()} for i in range(len(pictures))]


def train_reader(styles: bool, seed: int = 0) -> tuple[Reader, dict[str, float]]:
    """A reader of plain drawings, or of every style, and each head's accuracy on fresh drawings."""
    heads = list(HEADS) if styles else [head for head in HEADS if head != "style"]
    x, words = fresh(DRAWINGS, styles, f"reader {seed}")
    gen = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reader = Reader(heads)
    opt = torch.optim.AdamW(reader.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(0, DRAWINGS, (BATCH,), generator=gen)
        logits = reader(spoil(x[rows], gen))
        loss = sum(F.cross_entropy(logits[head], words[head][rows]) for head in heads)
        loss.backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
    reader.eval()
    x, words = fresh(HELD_OUT, styles, f"reader {seed}, held out")
    found = predict(reader, x)
    return reader, {head: (found[head] == words[head]).float().mean().item() for head in heads}


def trained_reader(styles: bool, seed: int = 0) -> tuple[Reader, dict[str, float]]:
    """`train_reader`, or what it gave the last time that the same sources trained it."""
    sources = "".join(Path(source).read_text() for source in (world.__file__, drawings.__file__, __file__))
    key = hashlib.sha256(f"{sources} {styles} {seed}".encode()).hexdigest()[:16]
    path = CACHE / f"{'styles' if styles else 'plain'}-{key}.safetensors"
    if not path.exists():
        print("training a reader: about two minutes", flush=True)
        reader, accuracy = train_reader(styles, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(reader.state_dict(), path, {head: repr(share) for head, share in accuracy.items()})
    with safe_open(path, "pt") as file:
        accuracy = {head: float(file.metadata()[head]) for head in HEADS if head in file.metadata()}
        reader = Reader(list(accuracy))
        reader.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    return reader.eval(), accuracy
