"""Where everything meets: the recipe becomes plain arguments, and these become a run that is ready to step."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from PIL import Image

from finetune import __version__, device, registry
from finetune.artifact import WHOLE
from finetune.batch import Batch, Conditioning
from finetune.data import cache, changed
from finetune.data.cache import Cache
from finetune.data.index import Index
from finetune.data.loader import Loader, Stream
from finetune.diffusion.noise import derive
from finetune.diffusion.path import Discrete
from finetune.errors import FinetuneError
from finetune.formats import base as formats
from finetune.formats import single_file
from finetune.optim.ema import Ema
from finetune.optim.optimizer import OPTIMIZERS
from finetune.optim.rounding import rounded
from finetune.recipe import Recipe, difference, training_part
from finetune.runfolder import RunFolder
from finetune.train import ground, trackers
from finetune.train.compile import compile_blocks
from finetune.train.judge import Judge
from finetune.train.learned import check_said
from finetune.train.sampling import followed, previews
from finetune.train.step import TrainStep
from finetune.train.together import Together, built

Say = Callable[[str], None]
PATIENCE = timedelta(days=1)        # with one process that makes class pictures, previews or the proof, while the others wait
PACKAGES = ("torch", "numpy", "diffusers", "transformers", "peft", "accelerate")     # whose code makes numbers


@dataclass
class Run:
    """Everything the loop needs."""

    recipe: Recipe
    folder: RunFolder
    accelerator: Accelerator
    family: object
    method: Together
    objective: Callable                 # see objectives/base.py
    loader: Loader
    validation: Stream | None           # the pictures that are held out
    parameters: dict[str, torch.nn.Parameter]   # what is trained, under the artifact's names, and the objective's own
    model: torch.nn.Module              # the wrapped TrainStep
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    identity: dict
    say: Say
    judge: Judge | None = None          # what is measured of previews
    base_pictures: list[Image.Image] | None = field(default=None)   # previews of the untouched base, once sampled
    base_losses: torch.Tensor | None = field(default=None)          # on held-out pictures, once measured


def accelerate(recipe: Recipe, folder: RunFolder | None = None) -> Accelerator:
    """The recipe wins over `accelerate config` and its environment variables. Without a run's folder nothing is tracked."""
    tracked = list(recipe.train.trackers) if folder else []
    trackers.check(tracked)
    try:
        return Accelerator(mixed_precision=recipe.train.mixed_precision, log_with=tracked or None,
                           project_dir=folder and folder.root / "trackers", dynamo_backend="no",
                           gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                           kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    except ValueError as e:
        raise FinetuneError(f"train.mixed_precision: {recipe.train.mixed_precision} is not available here: {e}") from None


def prepare(recipe: Recipe, folder: RunFolder, accelerator: Accelerator, say: Say, begun: dict | None) -> Run:
    """Load, scan, install, encode. Raises FinetuneError for all that cannot work, before anything is trained.

    `begun` is the identity of the run in the folder that this one has to continue."""
    train = recipe.train
    base = ground.load(recipe, accelerator, say)
    family = base.family
    data = [stream.index.fingerprint() for stream in base.streams]
    identity = {
        "exact": {"recipe": training_part(recipe), "data": " ".join(data), "base": base.weights,
                  "processes": accelerator.num_processes, "device": accelerator.device.type},
        "rounding": {"threads": torch.get_num_threads(), "machine": device.name(accelerator.device), "code": code(),
                     "finetune": __version__, **{package: version(package) for package in PACKAGES}},
    }
    if begun:
        check_identity(begun, identity, folder, [stream.index for stream in base.streams], say)
    method = install(recipe, base)
    for job in previews(recipe):
        ground.check_prompt("preview.prompts", job.prompt, family)
        if job.condition:
            followed(job)
    if folder.name in base.learned.tokens and len(recipe.method) > 1:
        raise FinetuneError(f"method.tokens: {folder.name} is the run's name, "
                            "and so that of the other method's file; rename one of them")
    if train.gradient_release and accelerator.num_processes > 1:
        raise FinetuneError(f"train.gradient_release: each of the {accelerator.num_processes} processes would step by its own "
                            "gradient; leave it out, or start one process")
    make = partial(OPTIMIZERS[train.optimizer], betas=train.betas, weight_decay=train.weight_decay)
    objective = registry.find("objectives", recipe.objective.kind).build(
        **recipe.objective.model_dump(exclude={"kind"}, exclude_none=True), step_size=base.streams[0].order.size)
    own = {f"objective.{name}": p for name, p in torch.nn.ModuleDict(objective.networks).named_parameters()}
    groups = method.groups(train.learning_rate, train.max_steps)
    if own:
        groups.append({"params": [*own.values()], "lr": train.learning_rate, "peak_lr": train.learning_rate,
                       "until": train.max_steps})
    optimizer = partial(rounded, make, groups, lambda step: derive(train.seed, step, "rounding"))
    optimizer()     # for what it refuses: the true one is made where the weights are, once they are there
    if method.objective == "denoise":       # to decode, pictures are wanted themselves
        base = ground.encoded(base, method.trains, train.max_steps, accelerator, Cache(cache.home(), say))
    ground.let_go(recipe, base, method.trains)
    device.spare_memory()
    for part in family.parts.values():
        part.to(accelerator.device)
    loader = Loader(base.streams, train.batch_size, train.gradient_accumulation, accelerator.process_index,
                    accelerator.num_processes, recipe.data.workers)
    if train.gradient_checkpointing:
        method.compute_twice(family, train.gradient_checkpointing)
    if train.compile:
        compile_blocks(family.parts["denoiser"], accelerator.device, cache.home().parent / "compiled")
    parameters = method.parameters()
    ema = Ema(parameters, train.ema.decay) if train.ema else None
    model, optimizer = accelerator.prepare(TrainStep(family, method, objective, train.seed), optimizer())
    trained = sum(p.numel() for p in parameters.values())
    path = getattr(objective, "path", None) or family.path      # the recipe may have one of its own
    zero = ", zero terminal SNR" if isinstance(path, Discrete) and path.alphas_cumprod[-1] == 0 else ""
    bits = f", {recipe.base.quantize}" if recipe.base.quantize else ""
    say(f"base      {family.source.name} ({family.spec.name}, {path.prediction}{zero}, {recipe.base.dtype}{bits})")
    for note in family.notes:
        say(f"note: {note}")
    for line in ground.describe(recipe, base):
        say(line)
    kinds = " + ".join(getattr(words, "variant", words.kind) for words in recipe.method)
    say(f"trains    {kinds}: {trained:,} parameters in {len(parameters)} tensors")
    for name, network in objective.networks.items():
        say(f"beside    a {name} of {sum(p.numel() for p in network.parameters()):,} parameters, which is not exported")
    if any(getattr(words, "encoder", False) for words in recipe.method):
        say("note: the encoder is trained too, so latents change: a denoiser that was trained on the old ones will not fit")
    judge = Judge(recipe, base.streams[0].index) if recipe.preview.metrics and accelerator.is_main_process else None
    return Run(recipe, folder, accelerator, family, method, objective, loader, base.validation, parameters | own, model,
               optimizer, ema, identity, say, judge)


def install(recipe: Recipe, base: ground.Ground) -> Together:
    """The recipe's methods, installed in the family. Raises FinetuneError for what they do not find there."""
    together, family = built(recipe, base.learned.tokens), base.family
    if together.objective != recipe.objective.kind:
        raise FinetuneError(f"objective.kind: {recipe.method[0].kind} is trained by {together.objective!r}")
    for method in together.methods:
        for name in recipe.export:
            formats.check_kind(name, method.kind, "export: ")
            if (name, method.kind) == ("single_file", "full"):
                single_file.check(family.spec)
    together.install(family)
    check_said(base.learned, base.streams[0], recipe.train.max_steps, family)
    for method in together.methods:
        if start := getattr(method.words, "start_from", None):
            method.start_from(formats.load(start, family.spec))
    return together


def seed_step(seed: int, position: int) -> None:
    """Set torch's generators, of every device, from the position: dropout inside the network draws from them."""
    torch.manual_seed(derive(seed, position, "network") % 2**32)


def to_device(batch: Batch, where: torch.device) -> Batch:
    def move(t):
        return None if t is None else t.to(where, non_blocking=True)

    text = (told := batch.conditioning) and Conditioning(move(told.tokens), move(told.pooled), move(told.mask))
    return replace(batch, weight=move(batch.weight), geometry=move(batch.geometry), pixels=move(batch.pixels),
                   latents=move(batch.latents), mask=move(batch.mask), beside=move(batch.beside), conditioning=text)


def code() -> str:
    """A hash of this toolkit's own sources: an installed copy may be edited, and its version not."""
    root = Path(__file__).resolve().parents[1]
    sources = sorted(root.rglob("*.py"))
    return hashlib.sha256(b"".join(f"{p.relative_to(root)}\0".encode() + p.read_bytes() for p in sources)).hexdigest()[:12]


def check_identity(begun: dict, now: dict, folder: RunFolder, data: list[Index], say: Say) -> None:
    """Raise FinetuneError, with the differences, when the run in the folder is another one than this. What changes rounding
    alone is said."""
    before, after = dict(begun["exact"]), dict(now["exact"])
    same = before.pop("data") == after.pop("data")
    if differences := ([] if same else changed.changes(folder.data, data)) + difference(before, after):
        raise FinetuneError("\n    ".join([f"{folder.root} holds a run that this one cannot continue:", *differences,
                            "--fresh moves it aside and starts anew; --run DIR starts beside it"]))
    for line in difference(begun["rounding"], now["rounding"]):
        say(f"note: since the last start, {line}: the last digits may differ")


def needed_bytes(run: Run) -> int:
    """An upper estimate of what the run writes: checkpoints (one more than are kept), adapters, previews and log."""
    train = run.recipe.train
    kept = train.keep_checkpoints + 1 + (train.max_steps // train.keep_every if train.keep_every else 0)
    trained = sum(p.numel() * 4 for p in run.parameters.values())
    moments = 4 if train.optimizer == "prodigy" else 2
    checkpoint = trained * (1 + moments + bool(run.ema))
    whole = sum(p.numel() * 4 for part in run.family.parts.values() for p in part.parameters())
    exported = (whole if any(method.kind in WHOLE for method in run.method.methods) else trained) * len(run.recipe.export)
    return checkpoint * kept + exported + 20_000_000
