"""The words of the methods; schema.py has the others."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from finetune.recipe.words import Fields, Fraction, Kind, Positive, Rate, Some, Text

RANKED = {"rank": 16, "alpha": None, "ranks": None, "alphas": None, "rank_dropout": None}
LORA = RANKED | {"init": "kaiming", "dropout": None, "lora_plus": None}


class TextLora(Fields):
    """The same adapter on the text encoders."""

    rank: Positive | None = None
    """Rank there; null is the method's."""
    alpha: Rate | None = None
    """Alpha there; null is each layer's own rank."""
    targets: Some[Text] = ("attention",)
    """Layers: attention, feed_forward, all (both), or patterns as `*.fc1`."""
    learning_rate: Rate | None = None
    """Their own learning rate, often a half or less; null is the method's."""


class Lora(Kind):
    """Low-rank adapter on linear and convolution layers, or one of its relatives."""

    own = {"lora": LORA | {"max_norm": None}, "rslora": LORA | {"max_norm": None}, "dora": LORA,
           "loha": RANKED | {"max_norm": None}, "lokr": {"factor": 8, "rank_dropout": None, "max_norm": None},
           "oft": {"block": 32}}
    word = called = "variant"
    kind: Literal["lora"]
    """The method."""
    variant: Literal["lora", "rslora", "dora", "loha", "lokr", "oft"] = "lora"
    """lora adds B·A; rslora scales it by alpha / √rank, for high ranks; dora also learns the length of each column; loha and
    lokr build a change of full rank from small factors; oft turns blocks of rows. Most tools load all of them, diffusers
    only lora and rslora (docs/decisions/0007)."""
    rank: Positive | None = None
    """Rank of the adapter: more can hold more, and its file grows in proportion; 16 if left out. lokr and oft have none."""
    alpha: Rate | None = None
    """The adapter is scaled by alpha / rank; null is each layer's own rank."""
    ranks: dict[Text, Positive] = {}
    """Other ranks for some of the targets, by group or pattern, such as `{conv: 8, "*.attn1.*": 32}`."""
    alphas: dict[Text, Rate] = {}
    """Other alphas for some of the targets, likewise."""
    factor: Annotated[int, Field(ge=2)] | None = None
    """Of lokr: a matrix of about factor × factor, times one that has so many times fewer rows and columns than the layer; 8
    if left out. Less holds more, in a larger file."""
    block: Annotated[int, Field(ge=2)] | None = None
    """Of oft: so many rows are turned together, or the nearest smaller number that divides a layer's; 32 if left out."""
    init: Literal["kaiming", "gaussian"] | None = None
    """How A is drawn: as in the paper's code, if left out, or normal with a deviation of 1 / rank. B is zero."""
    dropout: Fraction = 0.0
    """Share of the adapter's inputs that is dropped in each step."""
    rank_dropout: Fraction = 0.0
    """Share of the ranks that is dropped in each step, of loha and lokr of the rows."""
    module_dropout: Fraction = 0.0
    """Share of the layers whose adapter is left out in each step."""
    targets: Some[Text] = ("cross_attention",)
    """Layers that get an adapter: cross_attention (of sd3 where text and picture meet), attention, feed_forward, all (of
    these, with the projections around them), conv (the rest of a UNet's blocks), or patterns as `*.to_k`."""
    learning_rate: Rate | None = None
    """The method's own learning rate; null is `train.learning_rate`."""
    lora_plus: Rate | None = None
    """LoRA+: B learns so many times faster than A, such as 16; null is as fast."""
    max_norm: Rate | None = None
    """After each step a layer's change is scaled down to this norm, such as 1; null lets it grow."""
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the run after which it stays as it is."""
    start_from: Text | None = None
    """An adapter file of this variant, with the same targets and ranks, that training goes on from."""
    text: TextLora | None = None
    """Also adapt the text encoders, such as `{rank: 8, learning_rate: 5e-5}`; null leaves them alone."""

    @classmethod
    def misfit(cls, name: str, value, known: dict) -> str | None:
        variant = known.get("variant")
        if name == "text" and value and (value.rank or value.alpha) and variant and "rank" not in cls.own[variant]:
            return f"{variant} has neither rank nor alpha; leave them out"


def _per_value(tokens):
    """`colour: per_value` is a token for each value of the column of that name."""
    return {name: {"column": name} if words == "per_value" else words for name, words in tokens.items()} \
        if isinstance(tokens, dict) else tokens


def _some_token(tokens: dict) -> dict:
    if not tokens:
        raise ValueError("wants at least one token")
    return tokens


class Token(Fields):
    """A word that is learned, or one word for each value of a column."""

    init: Text | None = None
    """Fields that it begins as, such as `dog`; of a column each value's own words, if left out."""
    vectors: Annotated[int, Field(ge=1, le=75)] = 1
    """How many vectors it is made of: more can hold more, and take as much room in each prompt."""
    column: Text | None = None
    """Learn a token for each value of this column, and put it where `{column}` stands in data.caption.template."""

    @model_validator(mode="after")
    def _begins(self) -> "Token":
        if not (self.init or self.column):
            raise ValueError("wants init, the words that it begins as")
        return self


class Embedding(Fields):
    """Learned words (textual inversion): the model stays as it is."""

    kind: Literal["embedding"]
    """The method."""
    tokens: Annotated[dict[Text, Token], BeforeValidator(_per_value), AfterValidator(_some_token)]
    """What is learned, such as `{sks-dog: {init: dog}}` for a word that captions name, or `{colour: per_value}` for a word
    for each value of the column `colour`. Each becomes a file of its name."""
    learning_rate: Rate | None = None
    """The method's own learning rate, often 5e-4 to 5e-3; null is `train.learning_rate`."""
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the run after which it stays as it is."""


class TextFull(Fields):
    """The text encoders' own weights; their tokens stay."""

    learning_rate: Rate | None = None
    """Their own learning rate; null is the method's."""


class Full(Fields):
    """The weights of the denoiser themselves. What comes out is a whole model, a diffusers folder or
    a single file."""

    kind: Literal["full"]
    """The method."""
    targets: Some[Text] | None = None
    """Layers that are trained: groups or patterns as for a lora, such as `["*.attn2.to_k", "*.attn2.to_v"]`; null is all of
    the denoiser."""
    learning_rate: Rate | None = None
    """The method's own learning rate, often 1e-6 to 1e-5 for a large base; null is `train.learning_rate`."""
    text: TextFull | None = None
    """Also train the text encoders, such as `{learning_rate: 1e-6}` or `{}`; null leaves them alone."""
    extract_rank: Positive | None = None
    """Also write what changed as a LoRA of this rank, NAME.lora.safetensors; null does not."""
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the run after which it stays as it is."""


class Control(Fields):
    """A branch beside the denoiser of sd1, sd2 or sdxl that sees a condition picture (ControlNet); what it is shown in
    training is data.condition."""

    kind: Literal["control"]
    """The method."""
    learning_rate: Rate | None = None
    """The method's own learning rate, often 1e-5 for a large base; null is `train.learning_rate`."""
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the run after which it stays as it is."""


class VaeDecoder(Fields):
    """The decoder of the VAE, for sharper pictures from the same latents; captions are not needed."""

    kind: Literal["vae_decoder"]
    """The method."""
    encoder: bool = False
    """true trains the encoder too: latents change, so the denoiser no longer knows them."""
    learning_rate: Rate | None = None
    """The method's own learning rate; null is `train.learning_rate`."""
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the run after which it stays as it is."""
