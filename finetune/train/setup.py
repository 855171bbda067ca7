"""Where everything meets: the recipe becomes plain arguments, and these become a run that is ready to step."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import numpy
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed
from PIL import Image

from finetune import __version__, device, registry
from finetune.data import cache, encode
from finetune.data.cache import Cache
from finetune.data.loader import Encoded, Loader, View
from finetune.data.scan import Example, fingerprint, scan
from finetune.diffusion.noise import derive
from finetune.errors import FinetuneError
from finetune.families import base as families
from finetune.optim.ema import Ema
from finetune.optim.optimizer import OPTIMIZERS
from finetune.recipe import Recipe, difference, training_part
from finetune.runfolder import RunFolder
from finetune.train.step import TrainStep

Say = Callable[[str], None]


@dataclass
class Ground:
    """What a run stands on, before a method changes the base."""

    examples: list[Example]
    view: View
    family: object
    weights: dict[str, str]             # part -> hash of its weights


@dataclass
class Run:
    """Everything the loop needs."""

    recipe: Recipe
    folder: RunFolder
    accelerator: Accelerator
    family: object
    method: object
    loader: Loader
    parameters: dict[str, torch.nn.Parameter]   # what is trained, under the artifact's names
    model: torch.nn.Module              # the wrapped TrainStep
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    identity: dict
    say: Say
    base_pictures: list[Image.Image] | None = field(default=None)   # previews of the untouched base, once sampled

    @property
    def positions_per_step(self) -> int:
        train = self.recipe.train
        return train.batch_size * train.gradient_accumulation * self.accelerator.num_processes


def accelerate(recipe: Recipe) -> Accelerator:
    """The recipe wins over `accelerate config` and its environment variables."""
    try:
        return Accelerator(mixed_precision=recipe.train.mixed_precision, dynamo_backend="no",
                           gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1))
    except ValueError as e:
        raise FinetuneError(f"train.mixed_precision: {recipe.train.mixed_precision} is not available here: {e}") from None


def load(recipe: Recipe, accelerator: Accelerator) -> Ground:
    """The pictures and the base, on the device. Raises FinetuneError for what cannot be read, or not be together."""
    device.set_threads(recipe.train.threads)
    device.check_precision(recipe.train.mixed_precision, recipe.base.dtype, accelerator.device)
    examples = scan(recipe.data.images, recipe.data.caption.template)
    family = registry.find("families", recipe.base.family).load(
        recipe.base.path, families.DTYPES[recipe.base.dtype], recipe.base.revision, recipe.base.variant)
    if recipe.data.resolution % family.stride:
        raise FinetuneError(f"data.resolution: {recipe.data.resolution} is not a multiple of {family.stride}, this base's VAE stride")
    for part in family.parts.values():
        part.to(accelerator.device)
    view = View(recipe.data.resolution, recipe.data.crop == "random", recipe.data.flip,
                recipe.data.caption.template, recipe.data.caption.dropout)
    return Ground(examples, view, family, {name: families.fingerprint({name: part}) for name, part in family.parts.items()})


def prepare(recipe: Recipe, folder: RunFolder, accelerator: Accelerator, say: Say, begun: dict | None) -> Run:
    """Load, scan, install, encode. Raises FinetuneError for all that cannot work, before anything is trained.

    `begun` is the identity of the run in the folder that this one has to continue."""
    train = recipe.train
    ground = load(recipe, accelerator)
    examples, view, family = ground.examples, ground.view, ground.family
    identity = {
        "exact": {"recipe": training_part(recipe), "data": fingerprint(examples), "base": ground.weights,
                  "processes": accelerator.num_processes, "device": accelerator.device.type},
        "rounding": {"threads": torch.get_num_threads(), "torch": torch.__version__, "numpy": numpy.__version__,
                     "finetune": __version__},
    }

    if begun:
        check_identity(begun, identity, folder, say)
    check_prompts(recipe, family)
    encode.check(examples, view, family.cut_text)
    method = install(recipe, family)
    loader = Loader(examples, view, train.seed, encoded(ground, method, accelerator, Cache(cache.home(), say)))
    if train.gradient_checkpointing:
        family.parts["denoiser"].enable_gradient_checkpointing()
    weighting = recipe.objective.weighting
    objective = registry.find("objectives", recipe.objective.kind).build(
        timesteps=recipe.objective.timesteps, weighting_kind=weighting.kind, gamma=weighting.gamma)
    groups = [{"lr": train.learning_rate} | group for group in method.groups()]
    for group in groups:
        group["peak_lr"] = group["lr"]
    optimizer = OPTIMIZERS[train.optimizer](groups, betas=tuple(train.betas), weight_decay=train.weight_decay)
    parameters = method.parameters()
    ema = Ema(parameters, train.ema.decay) if train.ema else None
    model, optimizer = accelerator.prepare(TrainStep(family, method, objective, train.seed), optimizer)
    trained = sum(p.numel() for p in parameters.values())
    say(f"base      {family.source.name} ({family.spec.name}, {family.path.prediction}, {recipe.base.dtype})")
    say(f"data      {len(examples)} pictures at {view.resolution} px from {recipe.data.images}")
    say(f"trains    {recipe.method[0].kind}: {trained:,} parameters in {len(parameters)} tensors")
    seen = train.max_steps * train.batch_size * train.gradient_accumulation * accelerator.num_processes / len(examples)
    say(f"plan      {train.max_steps} steps; each picture is seen {seen:.1f} times")
    return Run(recipe, folder, accelerator, family, method, loader, parameters, model, optimizer, ema, identity, say)


def install(recipe: Recipe, family):
    """The recipe's method, installed in the family."""
    if len(recipe.method) > 1:
        raise FinetuneError("method: several methods in one run cannot be trained yet; give one")
    fields = recipe.method[0].model_dump()
    method = registry.find("methods", fields.pop("kind")).build(**fields, seed=recipe.train.seed)
    if method.objective != recipe.objective.kind:
        raise FinetuneError(f"objective.kind: {recipe.method[0].kind} is trained by {method.objective!r}")
    method.install(family)
    return method


def encoded(ground: Ground, method, accelerator: Accelerator, store: Cache) -> Encoded:
    """What the frozen encoders have to say, from the cache or made now; random crops cannot be encoded beforehand."""
    family, view, quiet = ground.family, ground.view, not accelerator.is_main_process
    vae, text = encoders(ground, accelerator.device.type)

    def encode_all(examples: list[Example]) -> Encoded:
        states = None if "text" in method.trains else encode.texts(examples, view, family.encode_text, quiet, store, text)
        moments = None if view.random_crop else encode.pictures(examples, view, family.moments, quiet, store, vae)
        return Encoded(moments, states, family.latents)

    if accelerator.num_processes > 1:       # each encodes its share, and reads what the others have encoded
        with suppress(FinetuneError):       # met again below, by every process
            encode_all(ground.examples[accelerator.process_index::accelerator.num_processes])
        accelerator.wait_for_everyone()
    return encode_all(ground.examples)


def encoders(ground: Ground, device_type: str) -> tuple[str, str]:
    """What decides latents, and what decides text states, beside the pictures and the captions."""
    family = ground.family
    part = {name: [ground.weights[name], families.settings(module)] for name, module in family.parts.items()}
    text = [part[name] for name in sorted(part) if name not in ("denoiser", "vae")]
    return (cache.key(part["vae"], device_type),
            cache.key(text, families.vocabulary(family.tokenizer), device_type))


def seed_step(seed: int, position: int) -> None:
    """Set every global generator from the position: dropout inside the network draws from them."""
    set_seed(derive(seed, position, "network") % 2**32)


def check_prompts(recipe: Recipe, family) -> None:
    """Raise FinetuneError for a preview prompt that would be cut."""
    for prompt in recipe.preview.prompts:
        if cut := family.cut_text(prompt):
            raise FinetuneError(f"preview.prompts: {prompt!r} is too long for the text encoder: it would lose {cut!r}")


def check_identity(begun: dict, now: dict, folder: RunFolder, say: Say) -> None:
    """Raise FinetuneError, with the differences, when the run in the folder is another one than this."""
    if differences := difference(begun["exact"], now["exact"]):
        raise FinetuneError("\n    ".join([f"{folder.root} holds a run that this one cannot continue:", *differences,
                            "--fresh moves it aside and starts anew; --run DIR starts beside it"]))
    for line in difference(begun["rounding"], now["rounding"]):
        say(f"note: since the run began, {line}: the last digits may differ")


def needed_bytes(run: Run) -> int:
    """An upper estimate of what the run writes: checkpoints (one more than are kept), adapters, previews and log."""
    trained = sum(p.numel() * 4 for p in run.parameters.values())
    checkpoint = trained * (4 if run.ema else 3)
    return checkpoint * (run.recipe.train.keep_checkpoints + 1) + trained * len(run.recipe.export) + 20_000_000
