"""What the commands share that open a base: the words for it."""

from finetune import registry
from finetune.errors import FinetuneError, nearest

PARTS = "denoiser", "text", "text_2", "text_3", "vae"


def add_arguments(parser, without: str = "") -> None:
    """`without` is what happens without a base, where that is allowed."""
    parser.add_argument("--base", required=not without,
                        help=f"`tiny`, a diffusers folder, a .safetensors file or a hub id{without}")
    parser.add_argument("--family", default="sd1")
    parser.add_argument("--revision", help="of a hub model")
    parser.add_argument("--variant", help="of the weight files, such as fp16")
    parser.add_argument("--prediction", choices=("epsilon", "v_prediction", "sample"),
                        help="what the base predicts, where it says so wrong or not at all")
    parser.add_argument("--zero-snr", action="store_true", default=None, help="its noising ends without any signal, likewise")
    parts_arguments(parser)


def recipe_arguments(parser, what: str = "a recipe file", **options) -> None:
    parser.add_argument("recipe", help=what, **options)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", dest="overrides",
                        help="override a field of the recipe; can be repeated")


def parts_arguments(parser) -> None:
    parts = parser.add_argument_group("parts of the base from elsewhere", "Each a diffusers folder, of a model or of the part "
                                      "alone, or a .safetensors file; --text-3 none leaves the T5 of sd3 out.")
    for part in PARTS:
        parts.add_argument(f"--{part.replace('_', '-')}", metavar="PATH")


def clip_skip_argument(parser) -> None:
    parser.add_argument("--clip-skip", type=int, default=1, metavar="N",
                        help="leave out the last N - 1 layers of the text encoder, as web UIs count; 1 if not given")


def changes(args):
    """What the words want to be otherwise about the base. FinetuneError for words about a base where there is none."""
    from finetune.families._source import Changes

    skip = getattr(args, "clip_skip", 1)
    if skip < 1:
        raise FinetuneError(f"--clip-skip {skip}: at least 1, which leaves nothing out")
    parts = {part: path for part in PARTS if (path := getattr(args, part))}
    if not args.base and (parts or skip > 1):
        word = next(iter(parts), "clip-skip").replace("_", "-")
        raise FinetuneError(f"--{word}: is of a base, and there is none; give --base")
    return Changes(parts, skip, prediction=getattr(args, "prediction", None), zero_snr=getattr(args, "zero_snr", None))


def dtype(name: str):
    from finetune.families.base import DTYPES

    if name not in DTYPES:
        raise FinetuneError(f"--dtype {name}: unknown{nearest(name, DTYPES)}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def load(args, numbers):
    """The family over its base, in these numbers."""
    return registry.find("families", args.family).load(args.base, numbers, args.revision, args.variant, changes(args))
