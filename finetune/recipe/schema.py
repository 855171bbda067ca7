"""The words of a recipe: their types, limits and defaults. The docstring under each field is the manual.

A mistake in a recipe must never pass as another value, so nothing is converted: "4" is not 4, and an unknown
key is an error. Only a whole number may stand where any number is wanted, and a list where a tuple is kept.
"""

from functools import partial
from typing import Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator)

from finetune import registry
from finetune.errors import FinetuneError

T = TypeVar("T")
STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False,
                    use_attribute_docstrings=True)


def _registered(group: str, name: str) -> str:
    try:
        return registry.check(group, name)
    except FinetuneError as error:
        raise ValueError(str(error)) from None


def _some(items: tuple) -> tuple:
    # Not `min_length`: pydantic counts only the items that are right, so one wrong item would be told twice.
    if not items:
        raise ValueError("wants at least one in the list")
    return items


def _different(words: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(words)) < len(words):
        raise ValueError(f"{', '.join(words)}: each may be named once")
    return words


def _listed(value):
    """One method may be written without the list around it."""
    return [value] if isinstance(value, dict) else value


def _named(value):
    """A weighting without numbers of its own may be written as its name alone."""
    return {"kind": value} if isinstance(value, str) else value


Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Many = Annotated[tuple[T, ...], Field(strict=False)]
Some = Annotated[Many[T], AfterValidator(_some)]
Pair = Annotated[tuple[T, T], Field(strict=False)]


class Base(BaseModel):
    """The model that is fine-tuned; its weights stay frozen."""

    model_config = STRICT

    family: Annotated[str, AfterValidator(partial(_registered, "families"))] = "sd1"
    """The family of the model."""
    path: Text
    """`tiny` (it ships with the toolkit), a hub id, or a diffusers folder."""
    revision: Text | None = None
    """Branch, tag or commit on the hub; null is the newest."""
    variant: Text | None = None
    """Variant of the weight files, such as `fp16`; null takes the plain ones."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format in which the frozen weights are held."""


class Caption(BaseModel):
    """How captions are made from what is written beside the pictures."""

    model_config = STRICT

    template: str = "{text}"
    """A text in which `{text}` stands for the caption and `{name}` for any column of metadata.jsonl."""
    dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of draws that see an empty caption, which keeps classifier-free guidance working."""


class Data(BaseModel):
    """The pictures and captions that are learned from."""

    model_config = STRICT

    images: Text
    """Folder of pictures with captions in metadata.jsonl or in a .txt beside each picture."""
    resolution: Annotated[int, Field(ge=8, multiple_of=8)] = 512
    """Side in pixels of the square that every picture is scaled and cropped to; a multiple of 8."""
    caption: Caption = Caption()
    """How captions are made."""
    flip: bool = False
    """Mirror half of the draws, left to right; not for faces, writing or anything with a side."""
    crop: Literal["center", "random"] = "center"
    """Where the square is cut. Random crops cannot be encoded beforehand, so they cost time in every step."""


class Lora(BaseModel):
    """Low-rank adapter on linear and convolution layers of the denoiser."""

    model_config = STRICT

    kind: Literal["lora"]
    """The method."""
    rank: Positive = 16
    """Rank of the adapter: more can hold more, and its file grows in proportion."""
    alpha: Rate = Field(default_factory=lambda known: float(known.get("rank", 1)))     # no rank: it is wrong
    """The adapter is scaled by alpha / rank; equal to the rank if left out."""
    dropout: Fraction = 0.0
    """Share of the adapter's inputs that is dropped in each step."""
    targets: Some[Text] = ("cross_attention",)
    """Layers that get an adapter: cross_attention, attention, feed_forward, all, or patterns as `*.to_k`."""
    learning_rate: Rate | None = None
    """The method's own learning rate; null is `train.learning_rate`."""


Method = Lora       # with a second method: Annotated[Lora | Full, Field(discriminator="kind")]


class Weighting(BaseModel):
    """How much each noise level counts."""

    model_config = STRICT

    kind: Literal["uniform", "min_snr"] = "uniform"
    """uniform, or min_snr, which keeps nearly clean pictures from ruling the loss."""
    gamma: Rate = 5.0
    """The signal-to-noise ratio at which min_snr stops counting more."""


class Objective(BaseModel):
    """The loss."""

    model_config = STRICT

    kind: Annotated[str, AfterValidator(partial(_registered, "objectives"))] = "denoise"
    """The objective."""
    timesteps: Literal["uniform"] = "uniform"
    """How often each noise level is drawn."""
    weighting: Annotated[Weighting, BeforeValidator(_named)] = Weighting()
    """How much each noise level counts; `min_snr` alone stands for `{kind: min_snr}`."""


class Ema(BaseModel):
    """An exponential moving average of what is trained; exports and previews then show the average."""

    model_config = STRICT

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Share of the average that survives a step."""


class Train(BaseModel):
    """How long, how fast and with what the loop steps."""

    model_config = STRICT

    max_steps: Positive = 1000
    """Optimizer steps in all."""
    batch_size: Positive = 1
    """Pictures that one process sees at once."""
    gradient_accumulation: Positive = 1
    """Batches that are summed up for one optimizer step."""
    learning_rate: Rate = 1e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up: level, or down to 0 at the last step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate climbs to its peak; at most max_steps."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """The optimizer; adamw8bit holds its state in a quarter of the memory and needs bitsandbytes."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    betas: Pair[Fraction] = (0.9, 0.999)
    """Decay of the optimizer's averages of the gradient and of its square."""
    clip_norm: Rate | None = 1.0
    """The gradient is scaled down to this norm; null leaves it alone."""
    ema: Ema | None = None
    """Average what is trained, such as `{decay: 0.999}`; null does not."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Number format of the computation; trained parameters are always float32."""
    seed: Seed = 0
    """Every random number of the run follows from it."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, about a third slower."""
    threads: Positive | None = None
    """CPU threads of one process; null shares out all cores."""
    keep_checkpoints: Positive = 2
    """The newest checkpoints that are kept."""

    @field_validator("warmup_steps")
    @classmethod
    def _within_the_run(cls, steps: int, info: ValidationInfo) -> int:
        if steps > info.data.get("max_steps", steps):
            raise ValueError(f"{steps} is more than train.max_steps, which is {info.data['max_steps']}")
        return steps


class Preview(BaseModel):
    """The pictures that are sampled on the way: the base beside what is trained so far."""

    model_config = STRICT

    prompts: Many[str] = ()
    """One row for each prompt and seed."""
    seeds: Some[Seed] = (0,)
    """Seeds that each prompt is sampled with."""
    steps: Positive = 25
    """Sampling steps."""
    guidance: Annotated[float, Field(ge=0)] = 5.0
    """Classifier-free guidance; 1 is none."""


class Every(BaseModel):
    """How often, in optimizer steps, something is done beside training."""

    model_config = STRICT

    log: Positive = 10
    """Write a line to metrics.jsonl."""
    preview: Annotated[int, Field(ge=0)] = 0
    """Sample previews; 0 is never."""
    checkpoint: Annotated[int, Field(ge=0)] = 250
    """Save a checkpoint; 0 is only when the run ends or is stopped."""


class Recipe(BaseModel):
    """A whole run: everything that decides what comes out."""

    model_config = STRICT

    base: Base
    """The model that is fine-tuned."""
    data: Data
    """The pictures and captions that are learned from."""
    method: Annotated[Some[Method], BeforeValidator(_listed)]
    """What is trained: one method or a list of them."""
    objective: Objective = Objective()
    """The loss."""
    train: Train = Train()
    """How long, how fast and with what."""
    preview: Preview = Preview()
    """The pictures that are sampled on the way."""
    every: Every = Every()
    """How often something is done beside training."""
    export: Annotated[Some[Annotated[str, AfterValidator(partial(_registered, "formats"))]],
                      AfterValidator(_different)] = ("kohya",)
    """Formats that the result is written in, such as [kohya, diffusers]."""

    @field_validator("method")
    @classmethod
    def _each_kind_once(cls, methods: tuple[Method, ...]) -> tuple[Method, ...]:
        _different(tuple(method.kind for method in methods))
        return methods

    @field_validator("every")
    @classmethod
    def _something_to_preview(cls, every: Every, info: ValidationInfo) -> Every:
        if every.preview and "preview" in info.data and not info.data["preview"].prompts:
            raise ValueError(f"preview: {every.preview} has nothing to sample: preview.prompts is empty")
        return every
