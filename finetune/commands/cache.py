"""Encode what a recipe needs ahead of its runs; or say what the cache holds, or clear it."""

import sys

from finetune.commands._base import recipe_arguments
from finetune.errors import FinetuneError


def add_arguments(parser) -> None:
    recipe_arguments(parser, "a recipe file; not with --status or --gc", nargs="?")
    parser.add_argument("--status", action="store_true", help="say where the cache is, how much it holds and of what")
    parser.add_argument("--gc", action="store_true", help="remove what no run has used for a while")
    parser.add_argument("--older-than", type=float, default=30, metavar="DAYS", help="how long that is; 30 by default")


def run(args) -> int:
    """Build, clear or describe. FinetuneError for a recipe that is wrong and a folder that cannot be written."""
    if bool(args.recipe) == (args.status or args.gc):
        raise FinetuneError("finetune cache wants a recipe, or else --status or --gc")
    if args.recipe:
        return build(args.recipe, args.overrides)
    from finetune.data import cache, memory

    if args.gc:
        if not args.older_than >= 0:
            raise FinetuneError(f"--older-than {args.older_than:g}: a number of days, 0 or more")
        freed = sum(memory.collect(folder, args.older_than)
                    for folder in [cache.home(), *(memory.home() / kind for kind in memory.BESIDE)])
        print(f"freed     {freed / 1e6:,.1f} MB that were not used for {args.older_than:g} days")
    describe()
    return 0


def build(recipe: str, overrides: list[str]) -> int:
    """Encode what is missing, in as many processes as the launcher was told to start."""

    from finetune.data import cache
    from finetune.recipe import load
    from finetune.train import ground, processes, setup

    loaded = load(recipe, overrides)
    processes.start_missing()
    with loaded.placing():
        accelerator = setup.accelerate(loaded.recipe)
        main = accelerator.is_main_process

        def say(line: str) -> None:
            if main:
                print(line, file=sys.stderr)

        base = ground.load(loaded.recipe, accelerator, say)
        if loaded.recipe.data.crop == "random":
            say("note      data.crop is random: pictures cannot be encoded beforehand, captions are")
        method = setup.install(loaded.recipe, base)
        ground.encoded(base, method.trains, loaded.recipe.train.max_steps, accelerator,
                       cache.Cache(cache.home(), say, strict=True))
    accelerator.wait_for_everyone()
    if main:
        describe()
    accelerator.end_training()
    return 0


def describe() -> None:
    """Where the cache is and what it holds."""
    from finetune.data import cache, memory

    print(f"cache     {memory.home()}")
    for kind, (entries, size) in sorted(cache.contents(cache.home()).items()):
        print(f"{kind:<9} {entries:,} entries, {size / 1e6:,.1f} MB")
    for kind, what in memory.BESIDE.items():
        if paths := [*(memory.home() / kind).glob("*")]:
            print(f"{kind:<9} {len(paths):,} {what}, {sum(map(memory.size, paths)) / 1e6:,.1f} MB")
