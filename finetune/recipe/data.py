"""The words of the data; schema.py has the others."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from finetune.recipe.words import Fields, Fraction, Positive, Rate, Some, Text, list_of


class Images(Fields):
    """One source of pictures and captions."""

    path: Text
    """A folder of pictures, .tar shards (webdataset) by a pattern as `shards/*.tar`, a saved dataset, or a hub id."""
    repeats: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    """How often each picture of this source is seen in an epoch."""
    split: Text = "train"
    """Of a dataset: the split."""
    image: Text = "image"
    """Of a dataset: the column that holds the pictures."""
    limit: Positive | None = None
    """Of a dataset: the first so many examples; null is all."""
    streaming: bool = False
    """Of a hub id: read only the first `limit` examples over the network and keep them, instead of downloading all."""


class Pixels(Fields):
    """How a file becomes 8-bit sRGB."""

    background: Annotated[str, Field(pattern="^#[0-9a-fA-F]{6}$")] = "#ffffff"
    """What transparent pixels are laid over, as `"#rrggbb"`."""
    animated: Literal["error", "first"] = "error"
    """A picture with several frames is unreadable, or stands for its first frame."""
    max_megapixels: Annotated[int, Field(ge=1, le=1000)] = 100
    """A larger picture is unreadable: it may be made to fill the memory."""


class Buckets(Fields):
    """Pictures of any shape: each is scaled and cropped to the nearest of some sizes with about resolution² pixels."""

    step: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    """Sides are multiples of this."""
    shortest: Positive | None = None
    """The least side in pixels; null is half of the resolution."""
    longest: Positive | None = None
    """The greatest side in pixels; null is twice the resolution."""
    upscale: bool = True
    """false: a picture that is smaller than its bucket gets a bucket of its own size, rounded down to `step`."""


class Choice(Fields):
    """One of several captions of a picture."""

    template: Text
    """A text with `{column}`s."""
    weight: Annotated[float, Field(gt=0, le=1_000_000)] = 1.0
    """How often it is drawn, beside the others."""


class Tags(Fields):
    """Captions that are lists of tags."""

    separator: Text = ","
    """What stands between two tags."""
    shuffle: bool = False
    """A new order at every draw."""
    keep: Annotated[int, Field(ge=0)] = 0
    """So many tags at the front stay where they are and are never dropped."""
    dropout: Fraction = 0.0
    """Share of the other tags that is left out at every draw."""


class Caption(Fields):
    """How captions are made from what is written beside the pictures."""

    template: Annotated[Some[Choice], list_of("template")] = (Choice(template="{text}"),)
    """A text in which `{text}` stands for the caption and `{name}` for any column, or a list of `{template, weight}`
    of which one is drawn."""
    trigger: Text | None = None
    """A word or two that is put before every caption that does not have it."""
    prefix: str = ""
    """Put before every caption as it is, spaces too."""
    suffix: str = ""
    """Put behind every caption as it is, spaces too."""
    tags: Tags | None = None
    """Treat captions as lists of tags, such as `{shuffle: true, keep: 1}`; null does not."""
    wildcards: bool = False
    """`a {red|blue} car`, in a caption or a template, is one of the two at every draw."""
    dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of draws that see an empty caption, which keeps classifier-free guidance working."""
    long: Literal["error", "truncate", "chunk"] = "error"
    """A caption of more than 75 tokens is an error, is cut, or is encoded in up to three pieces of 75. With T5, sd3 reads 255
    of its tokens, the CLIPs the beginning; it knows no pieces."""

    @classmethod
    def misfit(cls, name: str, value, known: dict) -> str | None:
        if name == "trigger" and value and value.isspace():
            return "wants a word; null is none"


class Mask(Fields):
    """What of a picture counts: the loss is averaged over the white of its mask."""

    source: Text = "alpha"
    """`alpha`: the picture's own transparency; else a folder of masks with the pictures' names."""
    unmasked_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How much a black pixel counts beside a white one."""


class Inpaint(Fields):
    """Where an inpainting model is to paint. The loss is that of the whole picture, as these models were trained."""

    masks: Text = "random"
    """`random`: boxes and strokes, new ones at every draw, that cover 5 to 80 % of the picture; else a folder of masks
    with the pictures' names, white where to paint."""
    whole: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of draws in which all of the picture is to be painted."""


class Prior(Fields):
    """Prior preservation (DreamBooth): pictures of the class are trained along, so that the class stays what it was."""

    images: Text | None = None
    """A folder of class pictures; null: all are made by the base."""
    prompt: Text
    """The caption of every class picture, and what the base makes the missing ones from."""
    template: Text | None = None
    """Captions of class pictures that have their own, such as `"{text}"`; null is the prompt for all."""
    count: Positive = 200
    """How many there have to be; what is missing is made by the base and kept."""
    weight: Rate = 1.0
    """How much a class picture counts beside a picture of yours."""
    steps: Positive = 25
    """Sampling steps of those that are made."""
    guidance: Annotated[float, Field(ge=0)] = 5.0
    """Guidance of those that are made; 1 is none."""


class Validation(Fields):
    """Pictures that are held out; copies of one picture stay on one side. Give one of the three."""

    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the pictures that is held out, drawn by the seed."""
    files: Text | None = None
    """A text file with the name of a held-out picture in each line."""
    images: Text | None = None
    """A folder of its own."""

    @model_validator(mode="after")
    def _one_way(self) -> "Validation":
        if (self.fraction is None) + (self.files is None) + (self.images is None) != 2:
            raise ValueError("wants one of fraction, files and images")
        return self


class Data(Fields):
    """The pictures and captions that are learned from."""

    images: Annotated[Some[Images], list_of("path")]
    """Folder of pictures with captions in metadata.jsonl or in a .txt beside each picture; or a list of sources, such as
    `[{path: dog, repeats: 10}, style]`."""
    resolution: Annotated[int, Field(ge=8, le=16384, multiple_of=8)] = 512
    """Side in pixels of the square that every picture is scaled and cropped to; a multiple of 8."""
    buckets: Buckets | None = None
    """Sizes of other shapes with as many pixels, such as `{step: 64}`; null is the square alone."""
    caption: Caption = Caption()
    """How captions are made."""
    flip: bool = False
    """Mirror half of the draws, left to right; not for faces, writing or anything with a side."""
    crop: Literal["center", "random"] = "center"
    """Where the piece is cut. Random crops cannot be encoded beforehand, so they cost time in every step."""
    pixels: Pixels = Pixels()
    """How files are read."""
    unreadable: Literal["error", "skip"] = "error"
    """A picture that cannot be read stops the start, or is left out and named in the log."""
    mask: Mask | None = None
    """What of a picture counts, such as `{source: alpha}`; null is all of it."""
    inpaint: Inpaint | None = None
    """Where an inpainting model is to paint, such as `{masks: random}`; null for any other model."""
    condition: Text | None = None
    """Of the method control: a folder with what its branch is shown of each picture, such as edges or coloured boxes, under
    the pictures' names and as large; null for any other method."""
    prior: Prior | None = None
    """Pictures of the class, such as `{prompt: a photo of a dog}`; null is none."""
    validation: Validation | None = None
    """Pictures that are held out, such as `{fraction: 0.1}`; null is none."""
    workers: Annotated[int, Field(ge=0, le=64)] = 2
    """Threads that read ahead while the model computes; 0 reads when it is needed. Changes no number."""
