"""Sample pictures from a base, with adapters merged in at any strength."""

import math
from pathlib import Path


def add_arguments(parser) -> None:
    parser.add_argument("--base", required=True, help="`tiny`, a diffusers folder, a .safetensors file or a hub id")
    parser.add_argument("--family", default="sd1")
    parser.add_argument("--revision", help="of a hub model")
    parser.add_argument("--variant", help="of the weight files, such as fp16")
    parser.add_argument("--adapter", action="append", default=[], metavar="FILE[:STRENGTH]", 
                        help="can be repeated; prompts name a learned token as its file is named")
    parser.add_argument("--strengths", default="1", metavar="S,S,…",
                        help="sample everything at each of these factors of the adapters; 0 is the base")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="P", help="can be repeated")
    source.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with one prompt a line")
    parser.add_argument("--negative", default="", metavar="P", help="what the pictures should not show")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture of each prompt; the next has the next")
    parser.add_argument("--count", type=int, default=1, help="pictures per prompt")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--scheduler", metavar="NAME", help="any diffusers scheduler by its class name; the base's own if not given")
    parser.add_argument("--size", metavar="WxH", help="in pixels; the base's own if not given")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--batch", type=int, default=8, help="pictures sampled together; changes no picture")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the PNGs go")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="also lay all of them out as one labelled picture")


def run(args) -> int:
    import json

    from PIL.PngImagePlugin import PngInfo

    from finetune import registry, tokens
    from finetune.errors import FinetuneError
    from finetune.families import base as families
    from finetune.train.preview import generate, grid

    prompts, strengths, size = read_prompts(args), numbers(args.strengths), parse_size(args.size)
    adapters = [parse_adapter(text) for text in args.adapter]
    for name, least in (("count", 1), ("steps", 1), ("batch", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise FinetuneError(f"--{name} {getattr(args, name)}: at least {least}")
    family = registry.find("families", args.family).load(args.base, dtype(args.dtype), args.revision, args.variant)
    step = max(8, family.stride)        # diffusers' pipeline wants 8 whatever the VAE
    if size and any(side <= 0 or side % step for side in size):
        raise FinetuneError(f"--size {args.size}: both sides have to be multiples of {step}")
    if args.grid and args.grid.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise FinetuneError(f"--grid {args.grid}: the name of a picture is needed, as in grid.png")
    to_device(family)
    loaded = [(load(path, family.spec), strength) for path, strength in adapters]
    learned = learned_tokens(family, loaded, adapters)
    loaded = [(artifact, strength) for artifact, strength in loaded if artifact.kind != "embedding"]
    with tokens.added(family, learned):
        for prompt in [*prompts, args.negative]:
            if cut := family.cut_text(prompt):
                raise FinetuneError(f"the prompt {prompt!r} is too long for the text encoder: it would lose {cut!r}")
    make(args.out)
    if args.grid:
        make(args.grid.parent)

    jobs = [(prompt, args.seed + i) for prompt in prompts for i in range(args.count)]
    columns = []
    for factor in strengths:
        active = [(artifact, strength * factor) for artifact, strength in loaded if strength * factor]
        with families.merged(family.parts, active), tokens.added(family, learned if factor else {}):
            pipeline = family.pipeline()
            if args.scheduler:
                pipeline.scheduler = scheduler(args.scheduler, pipeline.scheduler.config)
            pictures = list(generate(pipeline, jobs, args.steps, args.guidance, args.negative, size, args.batch,
                                     say=f"strength {factor:g}" if adapters else "sample"))
        columns.append(pictures)
        for i, ((prompt, seed), picture) in enumerate(zip(jobs, pictures)):
            facts = {"prompt": prompt, "negative": args.negative, "seed": seed, "steps": args.steps, "guidance": args.guidance,
                     "scheduler": type(pipeline.scheduler).__name__, "base": family.source.name,
                     "adapters": {path.name: strength * factor for path, strength in adapters}}
            info = PngInfo()
            info.add_itxt("parameters", json.dumps(facts, ensure_ascii=False))
            suffix = f"-strength{factor:g}" if len(strengths) > 1 else ""
            picture.save(args.out / f"{i:04d}-seed{seed}{suffix}.png", pnginfo=info)
    if args.grid:
        labels = ["base" if not (adapters and factor) else f"strength {factor:g}" for factor in strengths]
        grid([list(row) for row in zip(*columns)], [f"{prompt} · seed {seed}" for prompt, seed in jobs], labels).save(args.grid)
    print(f"{len(jobs) * len(strengths)} pictures in {args.out}" + (f", grid {args.grid}" if args.grid else ""))
    return 0


def parse_adapter(text: str) -> tuple[Path, float]:
    """FILE or FILE:STRENGTH. Raises FinetuneError when there is no such file."""
    from finetune.errors import FinetuneError

    head, colon, tail = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            path, strength = Path(head), numbers(tail)[0]
        except FinetuneError:
            path, strength = Path(text), 1.0
    else:
        path, strength = Path(text), 1.0
    if not path.is_file():
        raise FinetuneError(f"--adapter {text}: there is no file {path}")
    return path, strength


def load(path: Path, spec):
    from finetune.formats import base as formats

    return formats.load(path, spec)


def learned_tokens(family, loaded: list, adapters: list[tuple[Path, float]]) -> dict:
    """{token: part: rows} of the learned tokens among the adapters. Raises FinetuneError for those that do not fit."""
    from finetune.errors import FinetuneError
    from finetune.families import base as families
    from finetune.formats import base as formats

    found = {}
    for (artifact, strength), (path, _) in zip(loaded, adapters):
        if artifact.kind == "embedding":
            if strength != 1:
                raise FinetuneError(f"--adapter {path}:{strength:g}: a learned token has no strength; prompts name it or not")
            if misfits := families.misfits(family.parts, artifact):
                raise FinetuneError(f"--adapter {path}: {'; '.join(misfits)}")
            found[formats.token(path)] = formats.rows(artifact)
    return found


def read_prompts(args) -> list[str]:
    from finetune.errors import FinetuneError

    if args.prompt:
        return args.prompt
    try:
        lines = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise FinetuneError(f"--prompts {args.prompts}: cannot be read: {e}") from None
    if prompts := [line for line in lines if line]:
        return prompts
    raise FinetuneError(f"--prompts {args.prompts}: holds no prompt")


def numbers(text: str) -> list[float]:
    from finetune.errors import FinetuneError

    try:
        values = [float(word) for word in text.split(",")]
        if not all(map(math.isfinite, values)):
            raise ValueError
        return values
    except ValueError:
        raise FinetuneError(f"--strengths {text}: numbers with commas between them are needed, as in 0,0.5,1") from None


def parse_size(text: str | None) -> tuple[int, int] | None:
    """WxH → (height, width)."""
    from finetune.errors import FinetuneError

    if text is None:
        return None
    try:
        width, height = (int(side) for side in text.split("x"))
        return height, width
    except ValueError:
        raise FinetuneError(f"--size {text}: WIDTHxHEIGHT in pixels is needed, as in 512x768") from None


def dtype(name: str):
    from finetune.errors import FinetuneError, nearest
    from finetune.families.base import DTYPES

    if name not in DTYPES:
        raise FinetuneError(f"--dtype {name}: unknown{nearest(name, DTYPES)}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def scheduler(name: str, config):
    """The diffusers scheduler of that name over the base's noise schedule."""
    import diffusers

    from finetune.errors import FinetuneError, nearest

    names = [n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax")]
    if name not in names:
        raise FinetuneError(f"--scheduler {name}: diffusers has no such scheduler{nearest(name, names)}")
    try:
        return getattr(diffusers, name).from_config(config)
    except (ImportError, ValueError) as e:
        raise FinetuneError(f"--scheduler {name}: cannot be used here: {str(e).strip().splitlines()[0]}") from None


def to_device(family) -> None:
    from finetune import device

    for part in family.parts.values():
        part.to(device.best())


def make(folder: Path) -> None:
    from finetune.errors import FinetuneError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise FinetuneError(f"{folder} cannot be made: {e.strerror}") from None
