"""The words of the loop; schema.py has the others."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from finetune.recipe.words import FLAG, NAMED, Fields, Fraction, Kind, Many, Pair, Positive, Rate, Seed, Text, different


class Ema(Fields):
    """An exponential moving average of what is trained; exports and previews then show the average."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Share of the average that survives a step."""


BETAS = {"adamw": (0.9, 0.999), "adamw8bit": (0.9, 0.999), "lion": (0.9, 0.99), "lion8bit": (0.9, 0.99),
         "prodigy": (0.9, 0.999), "schedule_free_adamw": (0.9, 0.999)}      # the others have none


class Schedule(Kind):
    """Course of the learning rate after the warm-up."""

    own = {"constant": {}, "linear": {}, "cosine": {}, "cosine_restarts": {"cycles": 2}, "polynomial": {"power": 2.0},
           "wsd": {"decay": 0.2}}
    called = "schedule"

    kind: Literal["constant", "linear", "cosine", "cosine_restarts", "polynomial", "wsd"] = "constant"
    """constant stays at the peak, the others fall from it: cosine_restarts several times, wsd (stable, then decay) late."""
    cycles: Positive | None = None
    """Of cosine_restarts: how often it falls, 2 if left out."""
    power: Rate | None = None
    """Of polynomial: the exponent, 2 if left out; 1 is linear."""
    decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of wsd: the share of the steps at the end in which it falls, 0.2 if left out."""
    floor: Fraction = 0.0
    """The share of the peak that it falls to."""

    @classmethod
    def misfit(cls, name: str, value, known: dict) -> str | None:
        if name == "floor" and value and known.get("kind") == "constant":
            return "constant does not fall; leave it out"


class Train(Fields):
    """How long, how fast and with what the loop steps."""

    max_steps: Positive = 1000
    """Optimizer steps in all."""
    batch_size: Positive = 1
    """Pictures that one process sees at once."""
    gradient_accumulation: Positive = 1
    """Batches that are summed up for one optimizer step."""
    optimizer: Literal["adamw", "adamw8bit", "lion", "lion8bit", "adafactor", "prodigy", "schedule_free_adamw",
                       "sgd"] = "adamw"
    """The optimizer. 8bit holds the state in a quarter of the memory; lion wants a learning_rate 3 to 10 times smaller than
    adamw's; adafactor keeps next to no state; prodigy finds the learning rate; schedule_free_adamw averages in place of a
    schedule; sgd has a momentum of 0.9. lion and 8bit need bitsandbytes, prodigy prodigyopt, schedule-free schedulefree."""
    learning_rate: Rate = Field(default_factory=lambda known: 1.0 if known.get("optimizer") == "prodigy" else 1e-4)
    """Peak learning rate. Left out, it is 1e-4; for prodigy, which multiplies the rate that it finds by it, 1."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate climbs to its peak; at most max_steps."""
    schedule: Annotated[Schedule, NAMED] = Schedule()
    """Course of the learning rate after the warm-up; `cosine` alone stands for `{kind: cosine}`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay; sgd adds it to the gradient."""
    betas: Pair[Fraction] | None = Field(None, validate_default=True)
    """Decay of the optimizer's averages of the gradient and of its square; null is [0.9, 0.999], and [0.9, 0.99] for lion.
    adafactor and sgd have none."""
    clip_norm: Rate | None = 1.0
    """The gradient is scaled down to this norm; null leaves it alone."""
    ema: Ema | None = None
    """Average what is trained, such as `{decay: 0.999}`; null does not."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Number format of the computation; trained parameters are always float32."""
    gradient_release: bool = False
    """Step each parameter within the backward pass and let go of its gradient, so that no two are held: less memory for
    `full`. In one process; wants gradient_accumulation: 1 and clip_norm: null. A part of a gradient that is not finite is left
    out, not the whole step."""
    seed: Seed = 0
    """Every random number of the run follows from it."""
    gradient_checkpointing: Annotated[Literal[False, True, "selective"], FLAG] = False
    """Compute activations twice instead of keeping them: less memory, about a third slower. selective keeps those that are
    dear to compute: nearly as little memory, for a tenth more arithmetic."""
    compile: bool = False
    """Compile the denoiser's blocks with torch.compile: minutes at the start, for each bucket anew, and other rounding."""
    lean: bool | None = None
    """Frozen layers keep nothing for gradients of their own: up to a quarter less activations. On a CPU they are also faster,
    and round otherwise. null is true on a CPU; on a GPU it is some Python in every step. Not together with compile."""
    deterministic: bool = False
    """On a GPU use deterministic kernels alone, so that the same run gives the same bytes there too; slower, by how much is
    not measured. On a CPU it changes nothing: there it is always so."""
    threads: Positive | None = None
    """CPU threads of one process; null shares out all cores."""
    keep_checkpoints: Positive = 2
    """The newest checkpoints that are kept."""
    keep_every: Positive | None = None
    """Checkpoints of every so many steps are kept for good; null keeps the newest alone."""
    max_time: Annotated[str, Field(min_length=2, pattern=r"^([0-9]+h)?([0-9]+m)?([0-9]+s)?$")] | None = None
    """How long one start may take, such as `3h` or `1h30m`: then it ends after its step as `finetune stop` would end it, and
    the same command continues. null is as long as it takes."""

    trackers: Annotated[Many[Text], AfterValidator(different)] = ()
    """Where the log and the previews go too, as Accelerate names them: tensorboard (into trackers/ of the run), wandb,
    mlflow, …"""
    keep_best: Annotated[bool | Text, FLAG] = False
    """Also hand over the best, in adapter/best/: true is what had the least loss on held-out pictures, and the name of one of
    preview.metrics, such as dino, what was best by that."""
    patience: Positive | None = None
    """End when so many looks in a row were not better than the best, by what keep_best says; null goes on to max_steps."""

    @property
    def seconds(self) -> float:
        """max_time."""
        if self.max_time is None:
            return float("inf")
        units = {"h": 3600, "m": 60, "s": 1}
        return sum(int(count) * units[unit] for count, unit in re.findall("([0-9]+)([hms])", self.max_time))

    @field_validator("betas")
    @classmethod
    def _of_the_optimizer(cls, betas: Pair[float] | None, info: ValidationInfo) -> Pair[float] | None:
        return betas or BETAS.get(info.data.get("optimizer"))

    @classmethod
    def misfit(cls, name: str, value, known: dict) -> str | None:
        optimizer, most, warmup = (known.get(word) for word in ("optimizer", "max_steps", "warmup_steps"))
        if name == "warmup_steps" and most and value > most:
            return f"{value} is more than train.max_steps, which is {most}"
        if name == "schedule" and optimizer == "schedule_free_adamw" and value.kind != "constant":
            return (f"{value.kind} does not fit schedule_free_adamw, which averages over the run in place of a schedule; "
                    "leave it out, or give warmup_steps alone")
        if name == "schedule" and value.cycles and None not in (most, warmup) and value.cycles > most - warmup:
            return f"{value.cycles} cycles do not fit in the {most - warmup} steps after the warm-up"
        if name == "betas" and value and optimizer and optimizer not in BETAS:
            return f"{optimizer} has none; leave it out"
        if name == "betas" and value and optimizer == "schedule_free_adamw" and value[0] == 0:
            return "the first is more than 0 for schedule_free_adamw, which divides by it"
        if name == "gradient_release" and value:
            needs = {"gradient_accumulation above 1 sums up": known.get("gradient_accumulation", 1) > 1,
                     "clip_norm measures": known.get("clip_norm") is not None,
                     "fp16 looks through": known.get("mixed_precision") == "fp16",
                     f"{optimizer} steps by": optimizer in ("prodigy", "schedule_free_adamw")}
            if any(needs.values()):
                return (f"{' and '.join(why for why, so in needs.items() if so)} the whole gradient, of which there is never "
                        "more than a part; clip_norm: null and gradient_accumulation: 1 go with it")
        if name == "lean" and value and known.get("compile"):
            return "what is compiled decides by itself what it keeps; leave one of the two out"
