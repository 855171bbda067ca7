"""What a run stands on: the recipe's pictures in their order, and the base, before a method changes it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
from accelerate import Accelerator

from finetune import device, registry
from finetune.data import cache, encode
from finetune.data.buckets import assign, sizes
from finetune.data.cache import Cache
from finetune.data.captions import Captions, literal
from finetune.data.duplicates import overlap
from finetune.data.index import Index, build, concatenated
from finetune.data.loader import Encoded, Stream, View
from finetune.data.order import Order
from finetune.data.pictures import Reading
from finetune.data.split import split
from finetune.data.tables import Note
from finetune.errors import FinetuneError
from finetune.families import base as families
from finetune.families._source import Changes
from finetune.formats import base as formats
from finetune.objectives._similarity import WINDOW
from finetune.recipe import Recipe
from finetune.recipe.data import Images
from finetune.train import prior as prior_pictures
from finetune.train.learned import Learned
from finetune.train.learned import words as learned_words

Say = Callable[[str], None]
Role = Literal["learn", "class", "validation"]
FIRST = {"learn": 0, "class": 2 ** 62, "validation": 2 ** 63}       # position of the first example, see data/loader.py


@dataclass
class Ground:
    """What a run stands on, before a method changes the base."""

    streams: list[Stream]               # the pictures that are learned, and those of the class
    family: object
    weights: dict[str, str]             # part -> hash of its weights
    validation: Stream | None = None    # the pictures that are held out
    learned: Learned = field(default_factory=Learned)       # the words that are to be learned

    @property
    def all(self) -> list[Stream]:
        return self.streams + ([self.validation] if self.validation else [])


def load(recipe: Recipe, accelerator: Accelerator, say: Say) -> Ground:
    """The pictures and the base, all but its denoiser on the device. FinetuneError for what cannot be read, or be together."""
    if recipe.data.prior and recipe.objective.kind == "decode":
        raise FinetuneError("data.prior: a VAE knows no classes; leave it out")
    device.set_threads(recipe.train.threads)
    device.keep_memory()
    device.set_deterministic(recipe.train.deterministic, accelerator.device)
    device.check_precision(recipe.train.mixed_precision, recipe.base.dtype, accelerator.device)
    index, held = pictures(recipe, say, not accelerator.is_main_process)
    family = base(recipe)
    shows, stride = shown(recipe, family), family.stride
    check_step(recipe, family.step)
    for name, part in family.parts.items():
        if name != "denoiser":      # it follows when the encoders have made room
            part.to(accelerator.device)
    weights = {name: families.fingerprint({name: part}) for name, part in family.parts.items()}
    device.spare_memory()       # the denoiser was read, and is not needed before the encoders are done
    size = recipe.train.batch_size * recipe.train.gradient_accumulation * accelerator.num_processes
    learned = learned_words(recipe, index)
    learn = partial(stream, recipe, stride, size, stands=learned.stands, shows=shows)
    ground = Ground([learn(index)], family, weights, held and learn(held, "validation"), learned)
    if recipe.data.prior:
        ground.streams.append(learn(class_pictures(recipe, ground, accelerator, say), "class"))
    encode.refuse([problem for s in ground.all for problem in encode.check_pictures(s.index, s.sizes)])
    if recipe.objective.ssim and (least := min(int(s.sizes.min()) for s in ground.all)) < WINDOW:
        raise FinetuneError(f"objective.ssim: compares windows of {WINDOW} pixels, and a picture is fitted to {least}; raise "
                            "data.resolution or data.buckets.shortest, or leave it out")
    encode.refuse([problem for s in ground.all if s.view.random_crop or recipe.objective.kind == "decode"
                   for problem in encode.check_masks(s)])
    return ground


def base(recipe: Recipe):
    """The family over the recipe's base, with what is merged into it."""
    given = recipe.base
    family = registry.find("families", given.family).load(
        given.path, families.DTYPES[given.dtype], given.revision, given.variant, changes(recipe))
    families.merge(family.parts, [(formats.load(a.path, family.spec), a.strength) for a in given.adapters])
    family.long = recipe.data.caption.long
    return family


def changes(recipe: Recipe) -> Changes:
    """What the words of the base want to be otherwise."""
    base = recipe.base
    return Changes(base.parts, base.clip_skip, base.quantize, base.prediction, base.zero_snr)


def shown(recipe: Recipe, family) -> str | None:
    """What the base is shown beside noisy latents, as a View has it. FinetuneError for what the two cannot do together."""
    inpaint, shows = recipe.data.inpaint, family.shows if recipe.objective.kind == "denoise" else None
    if inpaint and shows != "hole":
        raise FinetuneError("data.inpaint: is for inpainting models, and what is trained here is none; leave it out")
    if shows == "hole" and not inpaint:
        raise FinetuneError(f"base.path: {family.source.path} is an inpainting model, which has to be told where to paint: "
                            "add data.inpaint: {masks: random}")
    if recipe.data.condition and shows:
        raise FinetuneError("method.kind: control is for bases that are shown nothing beside noisy latents, and this one is")
    if shows and recipe.every.preview:
        how = {"hole": "--image makes with --mask", "small": "--image makes with --upscale"}
        raise FinetuneError("every.preview: this base paints nothing from a prompt alone; set it to 0 and look at what "
                            f"finetune sample {how[shows]}")
    shows = "condition" if recipe.data.condition else shows
    if shows in ("small", "condition") and recipe.data.caption.long == "chunk":    # what they see instead is not masked
        raise FinetuneError("data.caption.long: an upscaler's layers, and a control branch's, cannot leave out what fills "
                            "shorter captions up; truncate instead of chunk, or shorten the captions")
    return shows if shows != "hole" else "random" if inpaint.masks == "random" else "files"


def check_step(recipe: Recipe, step: int) -> None:
    """Raise FinetuneError for sizes that the base cannot take."""
    buckets = recipe.data.buckets and recipe.data.buckets.step
    for key, side in (("resolution", recipe.data.resolution), ("buckets.step", buckets)):
        if side and side % step:
            raise FinetuneError(f"data.{key}: {side} is not a multiple of {step}, as the sides of this base's pictures are")


def reading(recipe: Recipe) -> Reading:
    background = tuple(bytes.fromhex(recipe.data.pixels.background[1:]))
    return Reading(background, recipe.data.pixels.animated == "first", recipe.data.pixels.max_megapixels * 10**6)


def pictures(recipe: Recipe, say: Say, quiet: bool) -> tuple[Index, Index | None]:
    """The examples that are learned, and those that are held out. Raises FinetuneError for all that is wrong with them."""
    wanted = recipe.data.validation
    index = usable(found(recipe, "learn", say, quiet), recipe, say, words(recipe))
    if not wanted:
        return index, None
    if wanted.images:
        held = usable(found(recipe, "validation", say, quiet), recipe, say, words(recipe))
        if pairs := overlap(index, held, reading(recipe)):
            raise FinetuneError("\n    ".join(["data.validation.images: holds pictures that are learned too", *(
                f"{held.name(h)} shows what {index.name(i)} shows" for i, h in pairs[:20])]))
        return index, held
    return split(index, wanted.fraction, wanted.files, recipe.train.seed, reading(recipe))


def found(recipe: Recipe, role: Role, say: Say, quiet: bool) -> Index | None:
    """The pictures of a role as they lie there, whatever is wrong with them; None where the recipe names no place."""
    data = recipe.data
    sources = {"learn": data.images,
               "validation": data.validation and data.validation.images and [Images(path=data.validation.images)],
               "class": data.prior and data.prior.images and [Images(path=data.prior.images)]}[role]
    masks = data.mask.source if data.mask and role != "class" else None
    field = {"learn": "data.images", "validation": "data.validation.images", "class": "data.prior.images"}[role]
    holes = data.inpaint.masks if data.inpaint and role != "class" else None
    return build(sources, reading(recipe), masks, say, quiet, field, holes, data.condition) if sources else None


def usable(index: Index, recipe: Recipe, say: Say, captions: Captions) -> Index:
    """The index, if training can do with what is noted of it. What the recipe allows to be left out is said; raises
    FinetuneError for the rest, and for pictures without a caption."""
    for note in index.notes:
        if note.fatal and not fatal(note, recipe):
            say(f"skipped   {note.name}: {note.text}")
    encode.refuse([note for note in index.notes if fatal(note, recipe)] + encode.check_captions(index, captions))
    return index


def fatal(note: Note, recipe: Recipe) -> bool:
    """Whether training cannot do with what is noted."""
    return note.fatal and not (note.kind == "unreadable" and recipe.data.unreadable == "skip")


def words(recipe: Recipe, role: Role = "learn") -> Captions:
    """How captions are made; none is needed to tune a VAE. The class has one for all, or its pictures' own; what is held
    out keeps its captions."""
    if recipe.objective.kind == "decode":
        return Captions((("", 1.0),))
    if role == "class":
        return Captions(((recipe.data.prior.template or literal(recipe.data.prior.prompt), 1.0),))
    caption = recipe.data.caption
    return Captions(tuple((choice.template, choice.weight) for choice in caption.template), caption.trigger, caption.prefix,
                    caption.suffix, caption.tags, caption.wildcards,
                    0.0 if role == "validation" else caption.dropout)


def stream(recipe: Recipe, stride: int, size: int, index: Index, role: Role = "learn",
           stands: Mapping[str, Mapping[str, str]] = {}, shows: str | None = None) -> Stream:
    """The examples of an index in their order, as the recipe wants them seen: `size` in a step. The class has one caption
    and no masks; what is held out is always seen the same way. `stands` are the words for the values of columns."""
    data, buckets = recipe.data, recipe.data.buckets
    known = sizes(data.resolution, buckets.step, buckets.shortest, buckets.longest) if buckets else \
        np.array([[data.resolution] * 2])
    fitted = assign(index.height, index.width, known, buckets.step if buckets and not buckets.upscale else None)
    captions = words(recipe, role) if role == "class" else replace(words(recipe, role), stands=stands)
    mask = data.mask and ("alpha" if data.mask.source == "alpha" else "files")
    view = View(reading(recipe), data.crop == "random", data.flip, mask, data.mask.unmasked_weight if mask else 0.0, stride,
                shows, data.inpaint.whole if data.inpaint else 0.0)
    weight = 1.0
    if role == "class":
        view, weight = replace(view, mask=None, shows="random" if shows == "files" else shows), data.prior.weight
    elif role == "validation":
        view = replace(view, random_crop=False, flip=False)
    order = Order(np.unique(fitted, axis=0, return_inverse=True)[1].ravel(), index.repeats, size, recipe.train.seed,
                  "order" if role == "learn" else f"{role} order")
    first = FIRST[role] // size * size if role == "class" else FIRST[role]      # a step's strata begin at multiples of it
    return Stream(index, fitted, captions, view, order, None, weight, first)


def class_pictures(recipe: Recipe, ground: Ground, accelerator: Accelerator, say: Say) -> Index:
    """The class pictures that are there, and as many made by the base as are missing."""
    prior, quiet = recipe.data.prior, not accelerator.is_main_process
    there = found(recipe, "class", say, quiet)
    if there is not None:
        usable(there, recipe, say, words(recipe, "class"))
    missing = max(0, prior.count - (len(there) if there else 0))
    if not missing:
        return there
    if ground.family.shows:
        raise FinetuneError(f"data.prior: this base makes no pictures from a prompt alone: give {missing} more in "
                            "data.prior.images, or lower data.prior.count")
    settings = prior.prompt, prior.steps, prior.guidance, recipe.data.resolution, recipe.train.seed
    where = prior_pictures.folder(*settings, ground)
    if accelerator.is_main_process:
        check_prompt("data.prior.prompt", prior.prompt, ground.family)
        ground.family.parts["denoiser"].to(accelerator.device)
        prior_pictures.make(where, missing, *settings, ground.family, quiet)
    accelerator.wait_for_everyone()
    made = build([Images(path=str(where))], reading(recipe), None, say, quiet, "data.prior")
    made = usable(made.take(np.arange(missing)), recipe, say, words(recipe, "class"))
    return concatenated([there, made]) if there else made


def check_prompt(key: str, prompt: str, family) -> None:
    """Raise FinetuneError for a prompt that the sampler would cut: it takes one piece, however captions are taken."""
    if cut := family.cut_prompt(prompt):
        raise FinetuneError(f"{key}: {prompt!r} is too long for the text encoder: it would lose {cut!r}")


def encoded(ground: Ground, trains: tuple[str, ...], steps: int, accelerator: Accelerator, store: Cache) -> Ground:
    """With what the frozen encoders have to say, from the cache or made now. Random crops cannot be encoded beforehand, and
    captions that differ at every draw are too many to be: of these, those that `steps` steps will draw are looked at."""
    family, quiet = ground.family, not accelerator.is_main_process
    vae, text = encoders(ground, accelerator.device.type)
    listed = not any(part.startswith("text") for part in trains) and all(stream.captions.finite for stream in ground.all)
    if not listed:
        encode.refuse([problem for s in ground.all for problem in encode.check_drawn(
            s, s.order.steps if s is ground.validation else steps, family.cut_text)])

    def share(rows: slice) -> Iterator[Encoded]:
        some = [replace(stream, index=stream.index.take(np.arange(len(stream.index))[rows]), sizes=stream.sizes[rows])
                for stream in ground.all]
        states = encode.texts([(s.index, s.captions) for s in some], family.encode_text, family.cut_text, quiet, store,
                              text) if listed else None
        for s in some:
            latents = None if s.view.random_crop else encode.pictures(s.index, s.sizes, s.view, family.moments, quiet, store,
                                                                      vae)
            yield Encoded(latents, states, family.latents)

    if accelerator.num_processes > 1:       # each encodes its share, and reads what the others have encoded
        with suppress(FinetuneError):       # met again below, by every process
            list(share(slice(accelerator.process_index, None, accelerator.num_processes)))
        accelerator.wait_for_everyone()
    known = [replace(stream, encoded=encoded) for stream, encoded in zip(ground.all, share(slice(None)))]
    return replace(ground, streams=known[:len(ground.streams)], validation=known[-1] if ground.validation else None)


def needed(recipe: Recipe, trains: tuple[str, ...], parts: Iterable[str], latents: bool, texts: bool) -> set[str]:
    """The parts that steps need where `latents` and `texts` are known beforehand. All stay for previews, for a model that is
    written as a whole, and where adapters were merged into the base, which loading anew would not have."""
    if recipe.every.preview or recipe.base.adapters or any(method.kind == "full" for method in recipe.method):
        return set(parts)
    if recipe.objective.kind != "denoise":
        return set(trains)
    return {*trains, "denoiser", *(() if latents else ("vae",)), *(() if texts else {*parts} - {"denoiser", "vae"})}


def let_go(recipe: Recipe, ground: Ground, trains: tuple[str, ...]) -> None:
    """Free the parts that no step needs; who asks for one later gets it loaded anew."""
    told, parts = [stream.encoded for stream in ground.all if stream.encoded], ground.family.parts
    latents = all(own.latents for own in told) and not ground.family.shows
    for part in {*parts} - needed(recipe, trains, parts, latents, all(own.text for own in told)):
        parts.let_go(part, ground.weights[part])


def encoders(ground: Ground, device_type: str) -> tuple[str, str]:
    """What decides latents, and what decides text states, beside the pictures and the captions."""
    family = ground.family
    part = {name: [known, families.settings(family.parts[name])] for name, known in ground.weights.items()}
    text = [part[name] for name in sorted(part) if name not in ("denoiser", "vae")]
    return (cache.key(part["vae"], device_type),
            cache.key(text, family.text_settings(), device_type))


def describe(recipe: Recipe, ground: Ground) -> list[str]:
    """What is learned from, for the log."""
    learn, steps = ground.streams[0], recipe.train.max_steps
    size, epoch = learn.order.size, learn.order.steps
    sources = ", ".join(source.path + (f" × {source.repeats}" if source.repeats > 1 else "") for source in recipe.data.images)
    lines = [f"data      {len(learn.index)} pictures at {recipe.data.resolution} px from {sources}"]
    if recipe.data.buckets:
        shapes, counts = np.unique(learn.sizes, axis=0, return_counts=True)
        lines.append("buckets   " + ", ".join(f"{w}×{h}: {n}" for (h, w), n in zip(shapes.tolist(), counts.tolist())))
    if len(ground.streams) > 1:
        prior = ground.streams[1]
        lines.append(f"prior     {len(prior.index)} class pictures, as many in a step, weight {prior.weight:g}")
    if learn.view.shows in ("random", "files"):
        lines.append(f"inpaint   {'drawn masks' if learn.view.shows == 'random' else 'masks of files'}, all of the picture in "
                     f"{learn.view.whole:.0%} of the draws; what they leave is encoded in every step")
    if ground.validation:
        lines.append(f"held out  {len(ground.validation.index)} pictures")
    smaller = int((-(-learn.order.counts // size) * size > learn.order.counts).sum())
    lines.append(f"plan      {steps} steps of {size}; an epoch is {epoch}"
                 + (f", {smaller} of them smaller" if smaller else "") + f"; each picture is seen {steps / epoch:.1f} times"
                 + (" its repeats" if (learn.index.repeats > 1).any() else ""))
    return lines
