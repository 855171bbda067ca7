"""Jobs → pictures, through diffusers' own pipelines over the family's own parts.

What a job holds decides the verb: a prompt alone, or with the condition of a control branch, is text-to-image, with an image
image-to-image, with a mask inpainting; an image that is to be upscaled goes to the pipeline of a base that does nothing else.
"""

import inspect
import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from finetune import __version__
from finetune.data import pictures
from finetune.data.beside import WHITE
from finetune.data.pixels import cut, plan_crop
from finetune.disk import replacing, writing
from finetune.errors import FinetuneError, nearest
from finetune.recipe import Recipe
from finetune.train import adapters
from finetune.train.infotext import png_info
from finetune.train.jobs import Job

ALSO = ("LCMScheduler", "SASolverScheduler", "TCDScheduler")    # fit where others do, though diffusers does not list them


def settle(family, jobs: list[Job]) -> list[Job]:
    """The jobs, each with its size. Raises FinetuneError for what this base cannot sample, before anything is."""
    denoiser, vae = family.parts["denoiser"].config, family.parts["vae"].config
    masked, upscales = denoiser.in_channels > vae.latent_channels, family.shows == "small"
    if upscales and not all(job.upscale for job in jobs):
        raise FinetuneError("this base was made for enlarging pictures, and does nothing else: give it --image and --upscale")
    if not upscales and any(job.upscale for job in jobs):
        raise FinetuneError("this base cannot --upscale: that takes one made for it, as in "
                            "--family upscaler --base stabilityai/stable-diffusion-x4-upscaler")
    if masked and not upscales and not all(job.mask for job in jobs):
        raise FinetuneError("this base was made for inpainting, and paints nothing else: give it --image and --mask")
    step = family.stride if upscales else max(8, family.step)       # diffusers' pipelines want 8 whatever the VAE
    own = denoiser.sample_size if isinstance(denoiser.sample_size, int) else min(denoiser.sample_size)
    seen: dict[tuple, tuple[int, int]] = {}
    settled = []
    for job in jobs:
        check_condition(job, "control" in family.parts)
        for text in (job.prompt, job.negative):
            if lost := family.cut_prompt(text):
                raise FinetuneError(f"the prompt {text!r} is too long for the text encoder: it would lose {lost!r}")
        if job.steps > (most := family.scheduler.config.num_train_timesteps):
            raise FinetuneError(f"steps: {job.steps} are more than the {most} that the base was trained with")
        if job.size and any(side % step for side in job.size):
            raise FinetuneError(f"size {job.size[1]}x{job.size[0]}: both sides have to be multiples of {step}")
        files = shown, _ = job.image or job.condition, job.mask
        if shown and files not in seen:
            seen[files] = _shape(*files)
        most = math.inf if upscales else own * family.stride        # an image that is enlarged is not made smaller before
        size = shrunk(*seen[files], most, step) if shown else (own * family.stride,) * 2
        settled.append(job.model_copy(update={"size": job.size or size}))
    return settled


def check_condition(job: Job, controlled: bool) -> None:
    """Raise FinetuneError for a condition that nothing follows, and for a control branch that has none."""
    if controlled and not job.condition:
        raise FinetuneError("one of the adapters is a control branch, which follows a picture: give it --condition")
    if job.condition and not controlled:
        raise FinetuneError("--condition: none of the adapters is a control branch, which could follow it")


def shrunk(height: int, width: int, side: int, step: int) -> tuple[int, int]:
    """The shape of a picture in multiples of `step`, of about side × side pixels at the most: a base knows no more."""
    factor = min(1, side / math.sqrt(height * width))
    return tuple(max(step, int(length * factor / step + 1e-6) * step) for length in (height, width))


def previews(recipe: Recipe) -> list[Job]:
    """A job for each prompt, condition and seed of a run's previews."""
    p = recipe.preview
    return [Job(prompt=prompt, condition=condition, seed=seed, steps=p.steps, guidance=p.guidance,
                size=(recipe.data.resolution,) * 2)
            for prompt in p.prompts for condition in p.conditions or (None,) for seed in p.seeds]


def generate(pipeline, jobs: list[Job], batch: int = 8, say: str | None = None) -> Iterator[Image.Image]:
    """One picture per job, in turn. Each picture's noise comes from its own seed, whatever else is in the batch. What a
    batch does change is rounding inside matrix products: the tiny base's PNGs differ by at most 1 of 255 in float32 and are
    the same in float64.

    `pipeline` is the family's, for text; `say` names a progress bar."""
    for job in jobs:
        check_condition(job, hasattr(pipeline, "controlnet"))
    with tqdm(total=len(jobs), desc=say, unit="img", disable=say is None, leave=False) as bar:
        for _, group in groupby(jobs, lambda job: (job.steps, job.guidance, job.size, job.change, _verb(job),
                                                   bool(job.negative))):
            alike = list(group)
            verb = over(pipeline, alike[0])
            verb.set_progress_bar_config(disable=say is None, leave=False)
            for start in range(0, len(alike), batch):
                some = alike[start:start + batch]
                # Without one None, which SDXL takes for zeros, and not "": see the family's `zeros`
                negative = [job.negative for job in some] if some[0].negative else None
                yield from verb(**worded(verb, "prompt", [job.prompt for job in some]),
                                **worded(verb, "negative_prompt", negative),
                                generator=[torch.Generator().manual_seed(job.seed) for job in some],
                                num_inference_steps=some[0].steps, guidance_scale=some[0].guidance,
                                **_pictures(verb, some)).images
                bar.update(len(some))


def worded(pipeline, name: str, prompts: list[str] | None) -> dict:
    """The prompts as the pipeline takes them. That of SD 3 knows no learned tokens of several vectors: they are spelled out
    for its CLIPs, while T5 reads what was written."""
    if prompts is None or not hasattr(pipeline, "tokenizer_3"):
        return {name: prompts}
    from diffusers.loaders import TextualInversionLoaderMixin

    spelled = TextualInversionLoaderMixin().maybe_convert_prompt(prompts, pipeline.tokenizer)
    return {name: spelled, f"{name}_2": spelled, f"{name}_3": prompts}


def over(pipeline, job: Job):
    """The pipeline of the job's verb, over the very same parts."""
    import diffusers

    others = {"inpaint": diffusers.AutoPipelineForInpainting, "image": diffusers.AutoPipelineForImage2Image}
    verb = _verb(job)
    return others[verb].from_pipe(pipeline) if verb in others else pipeline


def _verb(job: Job) -> str:
    return "upscale" if job.upscale else "inpaint" if job.mask else "image" if job.image else "text"


def _pictures(pipeline, jobs: list[Job]) -> dict:
    """What a verb takes besides text: jobs of one size, images and masks cut to it as the data room cuts them."""
    known, first, options = inspect.signature(pipeline.__call__).parameters, jobs[0], {}
    if first.size and "height" in known:        # otherwise the size is the image's
        options = {"height": first.size[0], "width": first.size[1]}
    if first.condition:
        options["image"] = [followed(job) for job in jobs]
    if first.image:
        cuts = [_cut(job) for job in jobs]
        options |= {"image": [image for image, _ in cuts]} | ({} if first.upscale else {"strength": first.change})
        if first.mask:
            options["mask_image"] = [mask for _, mask in cuts]
    return options


def followed(job: Job) -> Image.Image:
    """A condition as its branch sees it. Raises FinetuneError for one that cannot be read."""
    image = _read(pictures.read, job.condition)
    return cut(image, plan_crop(*image.size, job.size))


def _cut(job: Job) -> tuple[Image.Image, Image.Image | None]:
    image = _read(pictures.read, job.image)
    crop = plan_crop(*image.size, job.size)
    return cut(image, crop), cut(_read(pictures.mask, job.mask), crop) if job.mask else None


def _shape(shown: Path, over: Path | None) -> tuple[int, int]:
    """Height and width of an image or a condition. FinetuneError for one that cannot be read, or has no mask of its own."""
    image = _read(pictures.read, shown)
    if over:
        mask = _read(pictures.mask, over)
        if mask.size != image.size:
            raise FinetuneError(f"{over}: the mask has {mask.width} × {mask.height} pixels, its picture {shown.name} "
                                f"{image.width} × {image.height}; make them the same")
        if mask.getextrema()[1] < WHITE:
            raise FinetuneError(f"{over}: nothing in the mask is white, so nothing would be painted; "
                                "white is what is painted anew, black and transparent stay")
    return image.height, image.width


def _read(how, path: Path) -> Image.Image:
    try:
        return how(path.read_bytes(), str(path))
    except (OSError, ValueError) as e:      # of a name with a zero byte
        raise FinetuneError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None


def paint(family, loaded: list[adapters.Adapter], jobs: list[Job], files: list[Path], batch: int, say: str,
          factor: float = 1.0, scheduler=None) -> Iterator[Image.Image]:
    """The pictures of the jobs, each once it is in its file, with the adapters on at `factor` times their strength and, where
    one is given, another scheduler than the base's own."""
    with adapters.on(family, loaded, factor):
        pipeline, changes = family.pipeline(), family.source.changes
        pipeline.scheduler = scheduler or pipeline.scheduler
        facts = {"base": family.source.name, "scheduler": type(pipeline.scheduler).__name__, "version": __version__,
                 "clip_skip": changes.clip_skip, "parts": {part: Path(path).name for part, path in changes.parts.items()},
                 "adapters": {each.path.name: each.strength * factor for each in loaded}}
        loras = {each.path.stem: each.strength * factor for each in loaded if each.artifact.kind == "lora" and factor}
        for job, file, picture in zip(jobs, files, generate(pipeline, jobs, batch, say)):
            size = {"size": f"{picture.width}x{picture.height}"}        # of a job that is upscaled it is the small picture's
            write(picture, file, png_info(job.facts() | facts | size, loras))
            yield picture


def write(picture: Image.Image, path: Path, info: PngInfo | None = None) -> None:
    """A picture's file that is there as a whole or not at all. Raises FinetuneError."""
    with writing(f"{path}:"), replacing(path) as staged:
        picture.save(staged, Image.registered_extensions()[path.suffix.lower()], pnginfo=info)


def scheduler(name: str, own):
    """The diffusers scheduler of that name over the noise schedule of the base's own. Raises FinetuneError."""
    import diffusers

    names = [n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax")]
    if name not in names:
        raise FinetuneError(f"--scheduler {name}: diffusers has no such scheduler{nearest(name, names)}")
    flow = type(own).__name__.startswith("FlowMatch")
    fits = [type(own).__name__, *(cls.__name__ for cls in own.compatibles), *(() if flow else ALSO),
            *(n for n in names if flow and n.startswith("FlowMatch"))]
    try:
        if name not in fits:
            raise ValueError(f"it is not for bases like this; those that are: {', '.join(sorted(set(fits)))}")
        return getattr(diffusers, name).from_config(own.config)
    except (ImportError, ValueError) as e:
        raise FinetuneError(f"--scheduler {name}: cannot be used here: {str(e).strip().splitlines()[0]}") from None
