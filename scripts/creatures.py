"""A reader that knows one creature, such as zwx of `datasets/subject`: its pictures, others', and pictures of no creature.

Others are the class, and forgeries that differ from the one in one or two features: only who has them all is the one.
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

WHO = ("the one", "other", "none")
DRAWINGS, HELD_OUT, STEPS, BATCH = 6_000, 1_000, 900, 64


class Reader(nn.Module):
    """Pictures (B, 3, 64, 64) in [0, 1] → logits (B, 3)."""

    def __init__(self):
        super().__init__()
        self.body, self.who = readers.Reader([]).body, nn.Linear(192, len(WHO))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x - 0.5)
        return self.who(torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1))


def forged(one: drawings.Creature, rng: random.Random) -> drawings.Creature:
    """The one, with one or two features of somebody else's."""
    other = drawings.random_creature(rng)
    features = rng.sample(["colour", "body", "eyes", "top", "belly", "accent"], rng.choice([1, 2]))
    changed = replace(one, **{name: getattr(other, name) for name in features})
    return changed if changed != one else forged(one, rng)      # both may have the same body


def drawn(one: drawings.Creature, who: str, rng: random.Random) -> Image.Image:
    if who == "none":
        scene = world.random_scene(rng)
        return drawings.draw_hatched(scene) if rng.random() < 0.3 else world.draw(scene)
    creature = one if who == "the one" else drawings.random_creature(rng) if rng.random() < 0.5 else forged(one, rng)
    return make_datasets.posed(creature, rng.choice(list(world.BACKGROUNDS)), rng)


def fresh(one: drawings.Creature, count: int, stream: str) -> tuple[Tensor, Tensor]:
    rng = random.Random(stream)
    who = [rng.choice(WHO) for _ in range(count)]
    return readers.tensor([drawn(one, name, rng) for name in who]), torch.tensor([WHO.index(name) for name in who])


def trained(name: str) -> tuple[Reader, float]:
    """The reader of this creature, and its share of right answers on drawings that it has not seen."""
    one = drawings.CREATURES[name]
    sources = "".join(Path(module.__file__).read_text() for module in (world, drawings, readers)) + Path(__file__).read_text()
    path = readers.CACHE / f"creature-{name}-{hashlib.sha256(sources.encode()).hexdigest()[:16]}.safetensors"
    reader = Reader()
    if not path.exists():
        print(f"training a reader of the {name} creature: about two minutes", flush=True)
        torch.manual_seed(0)
        reader, gen, (x, who) = Reader(), torch.Generator().manual_seed(0), fresh(one, DRAWINGS, "creatures")
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
    x, who = fresh(one, HELD_OUT, "creatures, held out")
    return reader.eval(), (predict(reader, x) == who).float().mean().item()


@torch.no_grad()
def predict(reader: Reader, x: Tensor) -> Tensor:
    return torch.cat([reader(part).argmax(1) for part in x.split(256)])


def read(reader: Reader, pictures: list[Image.Image]) -> list[str]:
    """Who is in each picture."""
    return [WHO[i] for i in predict(reader, readers.tensor(pictures)).tolist()]


if __name__ == "__main__":
    for name in drawings.CREATURES:
        print(f"{name}: right on held-out drawings {trained(name)[1]:.2%}")
