"""Train what a recipe says; the same command again continues a stopped run."""

import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from finetune.commands._base import recipe_arguments
from finetune.disk import write_json, write_text
from finetune.errors import FinetuneError
from finetune.runfolder import RunFolder
from finetune.train import processes


def add_arguments(parser) -> None:
    recipe_arguments(parser)
    parser.add_argument("--run", type=Path, metavar="DIR", help="the run folder; runs/NAME of the recipe by default")
    parser.add_argument("--fresh", action="store_true", help="move an existing run folder aside and start anew")


def run(args) -> int:
    from finetune.recipe import load

    def end(number: int, frame) -> None:
        """Outside of the steps nothing has to be saved: what was encoded or made so far is found again."""
        signal.signal(number, signal.SIG_DFL)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    loaded = load(args.recipe, args.overrides)
    deadline = time.monotonic() + loaded.recipe.train.seconds
    processes.start_missing()
    name = Path(args.recipe).stem
    folder = RunFolder(args.run or Path("runs") / name, name)
    with loaded.placing():
        if os.environ.get("RANK", "0") == "0":      # the process that writes; before torch is imported, which takes seconds
            folder.lock([args.recipe, *(f"--set={setting}" for setting in args.overrides), f"--run={folder.root}"])
            folder.check_ours()
            folder.check_writable()
            folder.check_room(20_000_000)       # the exact need is known when everything is loaded
        from finetune import device     # after the processes are there: it imports torch

        try:
            return _train(loaded, args, folder, deadline)
        except device.OUT_OF_MEMORY as e:
            from finetune.commands.plan import levers, plan

            saving = "\n".join(levers(plan(args.recipe, args.overrides, device.memory_bytes())))
            raise FinetuneError(f"{e}\nwhat needs less memory, beside a smaller data.resolution:\n{saving}") from None
        except OSError as e:
            raise FinetuneError(f"{e.filename or folder.root}: {e.strerror or e}; the checkpoints that are there stay, and "
                                "the same command continues from the newest") from None


def _train(loaded, args, folder, deadline: float) -> int:
    from finetune.data import changed
    from finetune.recipe import dump
    from finetune.train import best, loop, report, setup, trackers

    recipe = loaded.recipe
    accelerator = setup.accelerate(recipe, folder)
    main = accelerator.is_main_process
    say = folder.say if main else (lambda line: None)
    begun = None if args.fresh else folder.known()
    run = setup.prepare(recipe, folder, accelerator, say, begun)
    if main:
        if args.fresh and folder.begun():
            say(f"{folder.root} is moved aside to {folder.set_aside()}")
        folder.create(setup.needed_bytes(run))
        if begun != run.identity:
            write_json(folder.identity, run.identity)      # first: it is what makes the folder a run, wherever a kill falls
        if begun is None or not folder.recipe.exists():
            write_text(folder.recipe, loaded.text)
        if begun is None or not folder.data.exists():
            changed.keep(folder.data, [stream.index for stream in run.loader.streams])
        write_text(folder.resolved, dump(recipe))
    accelerator.wait_for_everyone()
    trackers.start(accelerator, folder.root)
    start, window = loop.resume(run)
    if start:
        say(f"continues after step {start} of {recipe.train.max_steps}")
    try:
        with loop.Stop(deadline) as stop:
            loop.train(run, start, window, stop)
    except loop.Stopped as e:
        say("stopped and saved; the same command continues")
        return 128 + e.number
    run.optimizer.state.clear()     # a whole model's is larger than the model, and the proof loads that once more
    if main:
        with run.ema.swapped() if run.ema else nullcontext():
            hand_over(run)
        if recipe.train.keep_best:
            step, parameters = best.kept(run)
            say(f"best      of step {step} by {best.criterion(recipe)[0]}")
            run.method.restore(parameters)
            hand_over(replace(run, folder=folder.of_best()))
        say(f"report    {report.write([folder.root], folder.root / report.NAME)}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def hand_over(run) -> None:
    """Write what was trained, prove it, and say so."""
    from finetune import device
    from finetune.train import export, reconstruction, verify

    device.spare_memory()       # of the steps: the proof loads parts again
    paths = export.write(run.method.export(export.metadata(run)), run.folder, run.recipe.export, run.family)
    proof = export.prove(run, paths)
    for path in paths:
        size = sum(p.stat().st_size for p in [path, *path.rglob("*")])
        run.say(f"adapter   {path} ({size / 1000:,.0f} KB)\n{verify.table(proof[path.name])}")
    if run.method.objective == "decode":
        run.say(reconstruction.table(reconstruction.measure(run)))
