"""A reader that knows the zwx creature of `datasets/subject`: its pictures, those of others, and pictures of no creature.

Others are the class, and forgeries that differ from zwx in one or two of its features: only who has them all is zwx.
Trained from nothing on fresh drawings, spoilt like those of readers.py; kept in `runs/readers/`.
"""

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import drawings
import make_datasets
import readers
import torch
import torch.nn.functional as F
import world
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WHO = ("zwx", "other", "none")
DRAWINGS, HELD_OUT, STEPS, BATCH = 6_000, 1_000, 900, 64


class Reader(nn.Module):
    """Pictures (B, 3, 64, 64) in [0, 1] → logits (B, 3)."""

    def __init__(self):
        super().__init__()
        self.body, self.who = readers.Reader([]).body, nn.Linear(192, len(WHO))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x - 0.5)
        return self.who(torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1))


def forged(rng: random.Random) -> drawings.Creature:
    """Zwx with one or two features of somebody else's."""
    other = drawings.random_creature(rng)
    features = rng.sample(["colour", "body", "eyes", "top", "belly", "accent"], rng.choice([1, 2]))
    changed = replace(drawings.ZWX, **{name: getattr(other, name) for name in features})
    return changed if changed != drawings.ZWX else forged(rng)      # a round body is no change


def drawn(who: str, rng: random.Random) -> Image.Image:
    if who == "none":
        scene = world.random_scene(rng)
        return drawings.draw_hatched(scene) if rng.random() < 0.3 else world.draw(scene)
    creature = drawings.ZWX if who == "zwx" else drawings.random_creature(rng) if rng.random() < 0.5 else forged(rng)
    return make_datasets.posed(creature, rng.choice(list(world.BACKGROUNDS)), rng)


def fresh(count: int, stream: str) -> tuple[Tensor, Tensor]:
    rng = random.Random(stream)
    who = [rng.choice(WHO) for _ in range(count)]
    return readers.tensor([drawn(name, rng) for name in who]), torch.tensor([WHO.index(name) for name in who])


def trained() -> tuple[Reader, float]:
    """The reader and its share of right answers on drawings that it has not seen."""
    sources = "".join(Path(module.__file__).read_text() for module in (world, drawings, readers)) + Path(__file__).read_text()
    path = readers.CACHE / f"creatures-{hashlib.sha256(sources.encode()).hexdigest()[:16]}.safetensors"
    reader = Reader()
    if not path.exists():
        print("training a reader of creatures: about two minutes", flush=True)
        torch.manual_seed(0)
        reader, gen, (x, who) = Reader(), torch.Generator().manual_seed(0), fresh(DRAWINGS, "creatures")
        optimizer = torch.optim.AdamW(reader.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, STEPS)
        for _ in range(STEPS):
            rows = torch.randint(0, DRAWINGS, (BATCH,), generator=gen)
            F.cross_entropy(reader(readers.spoil(x[rows], gen)), who[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(reader.state_dict(), path)
    reader.load_state_dict(load_file(path))
    x, who = fresh(HELD_OUT, "creatures, held out")
    return reader.eval(), (predict(reader, x) == who).float().mean().item()


@torch.no_grad()
def predict(reader: Reader, x: Tensor) -> Tensor:
    return torch.cat([reader(part).argmax(1) for part in x.split(256)])


def read(reader: Reader, pictures: list[Image.Image]) -> list[str]:
    """Who is in each picture."""
    return [WHO[i] for i in predict(reader, readers.tensor(pictures)).tolist()]


if __name__ == "__main__":
    print(f"right on held-out drawings: {trained()[1]:.2%}")
