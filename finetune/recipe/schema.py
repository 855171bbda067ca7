"""The words of a recipe: their types, limits and defaults. The docstring under each field is the manual.

A mistake in a recipe must never pass as another value, so nothing is converted: "4" is not 4, and an unknown
key is an error. Only a whole number may stand where any number is wanted, and a list where a tuple is kept.
"""

import warnings
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from finetune.recipe.data import Data
from finetune.recipe.method import Control, Embedding, Full, Lora, VaeDecoder
from finetune.recipe.objective import Objective
from finetune.recipe.train import Train
from finetune.recipe.words import Fields, Many, Positive, Rate, Seed, Some, Text, different, list_of, registered

warnings.filterwarnings("ignore", 'Field name "validate"')     # pydantic's own, an old name that nothing here calls

Method = Annotated[Lora | Embedding | Full | Control | VaeDecoder, Field(discriminator="kind")]


def _kinds(known: dict) -> set[str]:
    """The methods of a recipe that is being checked."""
    return {method.kind for method in known.get("method", ())}


def _export(known: dict) -> tuple[str, ...]:
    """A whole model and a control branch are diffusers folders; of SD 3's LoRAs more tools read diffusers' names."""
    sd3 = "base" in known and known["base"].family == "sd3"
    loras = [method.variant for method in known.get("method", ()) if method.kind == "lora"]
    theirs = _kinds(known) & {"full", "control"} or sd3 and loras and not {*loras} - {"lora", "rslora"}
    return ("diffusers",) if theirs else ("kohya",)


def _listed(value):
    """One method may be written without the list around it."""
    return [value] if isinstance(value, dict) else value


class Merged(Fields):
    """An adapter that is merged into the base before anything else."""

    path: Text
    """A .safetensors file in any format that is read."""
    strength: float = 1.0
    """How often it counts."""


class Base(Fields):
    """The model that is fine-tuned; its weights stay frozen."""

    family: Annotated[str, registered("families")] = "sd1"
    """The family of the model."""
    path: Text
    """`tiny` (it ships with the toolkit), a hub id, a diffusers folder, or a .safetensors file in the original naming."""
    revision: Text | None = None
    """Branch, tag or commit on the hub; null is the newest."""
    variant: Text | None = None
    """Variant of the weight files, such as `fp16`; null takes the plain ones."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format in which the frozen weights are held."""
    adapters: Annotated[Many[Merged], list_of("path")] = ()
    """Adapters that are merged into the base first, such as `[{path: style.safetensors, strength: 0.8}]`. What is trained
    then is meant for this base with these adapters."""
    denoiser: Text | None = None
    """Take the denoiser from elsewhere: a diffusers folder, of a model or of the part alone, or a .safetensors file."""
    text: Text | None = None
    """Take the text encoder from elsewhere, likewise."""
    text_2: Text | None = None
    """Take the second text encoder from elsewhere, likewise."""
    text_3: Text | None = None
    """Take the T5 of sd3 from elsewhere, likewise; `none` does without it, which saves 9.5 GB in bfloat16 and leaves 75 tokens
    of a caption."""
    vae: Text | None = None
    """Take the VAE from elsewhere, likewise; also for a checkpoint that has none."""
    prediction: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the denoiser predicts, where the base itself says it wrong or not at all; not for sd3."""
    zero_snr: bool | None = None
    """Whether its noising ends without any signal (zero terminal SNR), likewise."""
    clip_skip: Positive = 1
    """Leave out the last layers of the text encoder of sd1 and sd2, counted as web UIs do: 1 is none, 2 the last one."""
    quantize: Literal["nf4", "int8"] | None = None
    """Hold the frozen weights of the denoiser's and the text encoders' linear layers in 4 or 8 bits, for less memory and a
    slower step; adapters stay float32. It needs bitsandbytes. See docs/decisions/0010."""

    @classmethod
    def misfit(cls, name: str, value, known: dict) -> str | None:
        if name == "quantize" and value and known.get("adapters"):
            return ("base.adapters cannot be merged into few bits; merge them first, with `finetune merge`, and give what "
                    "that writes as base.path")

    @property
    def parts(self) -> dict[str, str]:
        """The parts that come from elsewhere."""
        return {part: path for part in ("denoiser", "text", "text_2", "text_3", "vae") if (path := getattr(self, part))}


class Preview(Fields):
    """The pictures that are sampled on the way: the base beside what is trained so far."""

    prompts: Many[str] = ()
    """One row for each prompt and seed."""
    conditions: Annotated[Many[Text], AfterValidator(different)] = ()
    """Of the method control: pictures such as data.condition has; one row for each of them with each prompt and seed."""
    seeds: Some[Seed] = (0,)
    """Seeds that each prompt is sampled with."""
    strengths: Annotated[Some[Rate], AfterValidator(different)] = (1.0,)
    """How often what is trained counts: a column for each, beside the base's."""
    metrics: Many[Text] = ()
    """What is measured of the previews into metrics.jsonl, as `finetune eval` has it, such as [clip_t, "dino:a/network"]."""
    steps: Positive = 25
    """Sampling steps."""
    guidance: Annotated[float, Field(ge=0)] = 5.0
    """Classifier-free guidance; 1 is none."""
    thumbnail: bool = False
    """Keep the first preview of what was trained in the adapter's metadata, as a small JPEG that some web UIs show it by."""


class Every(Fields):
    """How often, in optimizer steps, something is done beside training."""

    log: Positive = 10
    """Write a line to metrics.jsonl."""
    preview: Annotated[int, Field(ge=0)] = 0
    """Sample previews; 0 is never."""
    validate: Annotated[int, Field(ge=0)] = 0
    """Measure the loss on the pictures of data.validation; 0 is never."""
    checkpoint: Annotated[int, Field(ge=0)] = 250
    """Save a checkpoint; 0 is only when the run ends or is stopped."""


class Recipe(Fields):
    """A whole run: everything that decides what comes out."""

    base: Base
    """The model that is fine-tuned."""
    data: Data
    """The pictures and captions that are learned from."""
    method: Annotated[Some[Method], BeforeValidator(_listed)]
    """What is trained: one method or a list of them."""
    objective: Objective = Field(default_factory=dict, validate_default=True)
    """The loss; its kind, if left out, is what the method is trained by."""
    train: Train = Field(default_factory=dict, validate_default=True)
    """How long, how fast and with what; the optimizer, if left out, is adamw8bit for the method full."""
    preview: Preview = Preview()
    """The pictures that are sampled on the way."""
    every: Every = Every()
    """How often something is done beside training."""
    export: Annotated[Some[Annotated[str, registered("formats")]], AfterValidator(different)] = Field(
        default_factory=_export)
    """Formats that the result is written in, such as [kohya, diffusers]. Left out it is kohya, which most tools read;
    diffusers for the methods full and control, whose results are diffusers folders (single_file writes that in the original
    naming), and for a LoRA of sd3, which has no form that all tools read."""

    @field_validator("objective", "train", mode="before")
    @classmethod
    def _of_the_method(cls, words: object, info: ValidationInfo) -> object:
        """What is left out and follows from the method."""
        kinds = _kinds(info.data)
        follows = {"objective": {"kind": "decode"} if "vae_decoder" in kinds else {},
                   "train": {"optimizer": "adamw8bit"} if "full" in kinds else {}}[info.field_name]
        return follows | words if isinstance(words, dict) else words

    @classmethod
    def misfit(cls, name: str, value, known: dict) -> str | None:
        rule = {"method": cls._method, "train": cls._train, "preview": cls._preview, "every": cls._every}.get(name)
        return rule and rule(value, known)

    @staticmethod
    def _method(methods: tuple[Method, ...], known: dict) -> str | None:
        kinds = tuple(method.kind for method in methods)
        different(kinds)
        base, data, control = known.get("base"), known.get("data"), "control" in kinds
        if base and base.quantize and (own := {"full", "control", "vae_decoder"} & set(kinds)):
            return (f"{own.pop()} trains weights of the base, or a copy, which base.quantize: {base.quantize} holds in few "
                    "bits; leave one of them out")
        if data and control != bool(data.condition):
            return "control wants data.condition, a folder with what it is to see of each picture" if control else \
                "data.condition is for the method control; leave it out"
        if control and (len(kinds) > 1 or data and (data.prior or data.inpaint)):
            return "control is trained alone: without other methods, data.prior and data.inpaint"

    @staticmethod
    def _train(train: Train, known: dict) -> str | None:
        if train.compile and "vae_decoder" in _kinds(known):
            return "compile: is of the denoiser, which vae_decoder does not run; leave it out"
        if train.compile and train.gradient_checkpointing == "selective":     # losses 6e-5 off after three steps, see the docs
            return "compile: is not proven to train the same with gradient_checkpointing: selective; true is"
        base, whole = known.get("base"), {"full", "control", "vae_decoder"} & set(_kinds(known))
        if train.mixed_precision == "fp16" and base and base.dtype == "bfloat16" and whole:
            return (f"mixed_precision: fp16 scales gradients, which weights in base.dtype: bfloat16, as {whole.pop()} trains "
                    "them, do not allow; bf16 or 'no' does")
        if train.gradient_release and "data" in known and known["data"].prior:
            return ("gradient_release: data.prior adds a batch to each step, and there is no gradient to add up with; leave "
                    "one of the two out")

    @staticmethod
    def _preview(preview: Preview, known: dict) -> str | None:
        if preview.conditions and "method" in known and not ("control" in _kinds(known) and preview.prompts):
            return "conditions are for the method control, and go with prompts; leave them out"

    @staticmethod
    def _every(every: Every, known: dict) -> str | None:
        data, train, preview = (known.get(word) for word in ("data", "train", "preview"))
        if every.preview and preview and not preview.prompts:
            return f"preview: {every.preview} has nothing to sample: preview.prompts is empty"
        if every.preview and preview and "control" in _kinds(known) and not preview.conditions:
            return f"preview: {every.preview} has nothing to follow: preview.conditions is empty"
        if not every.preview and preview and preview.thumbnail:
            return "preview.thumbnail is the first preview, and preview: 0 samples none"
        if every.validate and data and not data.validation:
            return f"validate: {every.validate} has nothing to measure: data.validation is null"
        if train and isinstance(train.keep_best, bool) and (train.keep_best or train.patience) and not every.validate:
            return f"train.{'keep_best' if train.keep_best else 'patience'} goes by every.validate, which is 0"
        if preview and preview.metrics and (not every.preview or 1 not in preview.strengths):
            return "preview.metrics are of what every.preview samples at the strength 1, and that is left out"
        if train and preview and not isinstance(train.keep_best, bool):
            if train.keep_best not in [word.partition(":")[0] for word in preview.metrics]:
                return f"train.keep_best goes by {train.keep_best}, which is none of preview.metrics"
