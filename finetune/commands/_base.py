"""What the commands share that open a base: the words for it, and the folder for what they make."""

from pathlib import Path


def add_arguments(parser, without: str = "") -> None:
    """`without` is what happens without a base, where that is allowed."""
    parser.add_argument("--base", required=not without, help=f"`tiny`, a diffusers folder, a .safetensors file or a hub id{without}")
    parser.add_argument("--family", default="sd1")
    parser.add_argument("--revision", help="of a hub model")
    parser.add_argument("--variant", help="of the weight files, such as fp16")


def dtype(name: str):
    from finetune.errors import FinetuneError, nearest
    from finetune.families.base import DTYPES

    if name not in DTYPES:
        raise FinetuneError(f"--dtype {name}: unknown{nearest(name, DTYPES)}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def load(args, numbers):
    """The family over its base, in these numbers."""
    from finetune import registry

    return registry.find("families", args.family).load(args.base, numbers, args.revision, args.variant)


def make(folder: Path) -> None:
    from finetune.errors import FinetuneError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise FinetuneError(f"{folder} cannot be made: {e.strerror}") from None
