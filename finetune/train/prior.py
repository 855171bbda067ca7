"""Prior preservation: the class pictures that are missing, made by the base itself (Ruiz et al. 2023, §3.2).

They are kept in the toolkit's cache under what they depend on: prompt, base, seed, size, sampler. Each comes from a
seed of its own, so making them can be stopped and continued, and more of them later begin with the same ones."""

from pathlib import Path

from finetune.data import cache
from finetune.data.memory import used
from finetune.diffusion.noise import derive
from finetune.disk import replacing, writing
from finetune.train.jobs import Job
from finetune.train.sampling import generate

AT_ONCE = 4


def folder(prompt: str, steps: int, guidance: float, resolution: int, seed: int, ground) -> Path:
    """Where the pictures of these settings are kept."""
    sampler = {name: value for name, value in ground.family.scheduler.config.items() if not name.startswith("_diffusers")}
    skip = ground.family.source.changes.clip_skip
    made_from = cache.key("class pictures", prompt, steps, guidance, resolution, seed, ground.weights,
                          type(ground.family.scheduler).__name__, sampler, *([skip] if skip > 1 else []))
    return cache.home().parent / "class" / made_from


def make(where: Path, count: int, prompt: str, steps: int, guidance: float, resolution: int, seed: int, family,
         quiet: bool) -> None:
    """Have the first `count` pictures in `where`; those that are missing are made, under their names only when complete."""
    files = [where / f"{number:06d}.png" for number in range(count)]
    missing = [number for number, file in enumerate(files) if not file.exists()]
    with writing(f"data.prior: {where}", "\n    FINETUNE_CACHE=DIR puts it elsewhere"):
        where.mkdir(parents=True, exist_ok=True)
        jobs = [Job(prompt=prompt, seed=derive(seed, number, "class picture") % 2**63, steps=steps, guidance=guidance,
                    size=(resolution, resolution)) for number in missing]
        for number, picture in zip(missing, generate(family.pipeline(), jobs, AT_ONCE, None if quiet else "class pictures")):
            with replacing(files[number]) as staged:
                picture.save(staged, "PNG")
        used(where)
