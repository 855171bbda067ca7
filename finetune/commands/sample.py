"""Sample pictures from a base, with adapters merged in at any strength."""

from pathlib import Path

from finetune.commands import _base
from finetune.errors import FinetuneError

OF_A_JOB = ("negative", "seed", "count", "steps", "guidance", "size", "image", "condition", "mask",
            "strength", "upscale")      # a file may say otherwise


def add_arguments(parser) -> None:
    _base.add_arguments(parser)
    _base.clip_skip_argument(parser)
    parser.add_argument("--adapter", action="append", default=[], metavar="FILE[:STRENGTH]",
                        help="can be repeated; prompts name a learned token as its file is named")
    parser.add_argument("--strengths", default="1", metavar="S,S,…",
                        help="sample everything at each of these factors of the adapters; 0 is the base")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="P", help="can be repeated")
    source.add_argument("--prompts", type=Path, metavar="FILE",
                        help=".txt with a prompt a line; .jsonl or .yaml with objects of prompt and, each counting more than "
                             f"the same word here, {', '.join(OF_A_JOB)}")
    parser.add_argument("--negative", metavar="P", help="what the pictures should not show")
    parser.add_argument("--seed", type=int, help="of the first picture of each prompt, 0 if not given; the next has the next")
    parser.add_argument("--count", type=int, help="pictures per prompt and image")
    parser.add_argument("--steps", type=int, help="25 if not given")
    parser.add_argument("--guidance", type=float, help="5 if not given; 1 is without")
    parser.add_argument("--size", metavar="WxH",
                        help="in pixels; if not given the base's own, or the shape of the --image in it")
    parser.add_argument("--image", type=Path, metavar="FILE|DIR",
                        help="change this picture, or each of a folder, as the prompt says")
    parser.add_argument("--condition", type=Path, metavar="FILE|DIR",
                        help="what a control branch, given as --adapter, follows: a picture, or each of a folder")
    parser.add_argument("--mask", type=Path, metavar="FILE|DIR",
                        help="paint the --image anew where this is white; of a folder each by its name")
    parser.add_argument("--strength", type=float, metavar="S",
                        help="how much of the --image is changed, above 0 up to 1; 0.8 if not given, 1 with a --mask. "
                             "(--strengths are factors of the adapters)")
    parser.add_argument("--upscale", action="store_true", default=None, help="enlarge the --image, with a base made for that")
    parser.add_argument("--scheduler", metavar="NAME",
                        help="any diffusers scheduler by its class name; the base's own if not given")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--batch", type=int, default=8,
                        help="pictures sampled together; no picture depends on it, but for rounding")
    parser.add_argument("--tiles", action="store_true",
                        help="let the VAE work tile by tile: large pictures in less memory, and blended where tiles meet")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the PNGs go")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="also lay all of them out as one labelled picture")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that are there already")


def run(args) -> int:
    from finetune.train.jobs import jobs, read

    _base.changes(args)
    if args.batch < 1:
        raise FinetuneError(f"--batch {args.batch}: at least 1")
    if args.grid and args.grid.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise FinetuneError(f"--grid {args.grid}: the name of a picture is needed, as in grid.png")
    numbers, factors = _base.dtype(args.dtype), strengths(args)
    given = {name: value for name in OF_A_JOB if (value := getattr(args, name)) is not None}
    wanted = jobs(read(args.prompts) if args.prompts else [("", "--", {"prompt": text}) for text in args.prompt], given)
    files = {factor: [args.out / f"{number:04d}-seed{job.seed}{f'-strength{factor:.15g}' if len(factors) > 1 else ''}.png"
                      for number, job in enumerate(wanted)] for factor in factors}
    check_free([*sum(files.values(), []), *([args.grid] if args.grid else [])], args.overwrite)

    from finetune import device
    from finetune.train import adapters, sampling
    from finetune.train.preview import grid

    named = [adapters.named(text) for text in args.adapter]
    family = _base.load(args, numbers)
    for part in family.parts.values():
        part.to(device.best())
    if args.tiles:
        family.parts["vae"].enable_tiling()
    loaded = adapters.load(named, family)
    with adapters.on(family, loaded):       # what is wrong with one of them is said before the first picture
        wanted = sampling.settle(family, wanted)
        scheduler = sampling.scheduler(args.scheduler, family.scheduler) if args.scheduler else None
    for folder in [args.out, *([args.grid.parent] if args.grid else [])]:
        folder.mkdir(parents=True, exist_ok=True)

    columns = []
    for factor, paths in files.items():
        say = f"strength {factor:g}" if loaded else "sample"
        found = sampling.paint(family, loaded, wanted, paths, args.batch, say, factor, scheduler)
        columns.append([picture for picture in found if args.grid])
    if args.grid:
        labels = [f"strength {factor:g}" if loaded and factor else "base" for factor in files]
        rows = [f"{job.prompt} · seed {job.seed}" for job in wanted]
        sampling.write(grid([list(row) for row in zip(*columns)], rows, labels), args.grid)
    if not args.quiet:
        print(f"{len(wanted) * len(files)} pictures in {args.out}" + (f", grid {args.grid}" if args.grid else ""))
    return 0


def strengths(args) -> list[float]:
    """The factors of the adapters, each once."""
    from finetune.train.adapters import finite

    try:
        found = list(dict.fromkeys(finite(word) for word in args.strengths.split(",")))
    except ValueError:
        raise FinetuneError(f"--strengths {args.strengths}: numbers with commas between them are needed, "
                            "as in 0,0.5,1") from None
    if found != [1] and not args.adapter:
        raise FinetuneError(f"--strengths {args.strengths}: they are of adapters, and there is none; "
                            "of an --image it is --strength")
    return found


def check_free(files: list[Path], overwrite: bool) -> None:
    """Raise FinetuneError for a file that is there already, unless it may be replaced."""
    there = [file for file in files if file.exists()]
    if there and not overwrite:
        raise FinetuneError(f"{there[0]}{f' and {len(there) - 1} more' * (len(there) > 1)}: there already, and not replaced; "
                            "name another folder, or --overwrite")
