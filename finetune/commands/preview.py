"""Sample a run's previews from its checkpoints, beside the training or afterwards."""

from pathlib import Path

WAIT = 2.0      # seconds between looks at a run that goes on


def add_arguments(parser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder whose recipe has preview.prompts")


def run(args) -> int:
    """Each checkpoint that has no preview gets one; at the end of the run it ends too."""
    import time

    from finetune.errors import FinetuneError
    from finetune.recipe import load
    from finetune.runfolder import RunFolder

    folder = RunFolder(args.run, args.run.name)
    if not (begun := folder.known()):
        raise FinetuneError(f"{args.run} is no run folder: it has no run.json")
    recipe = load(folder.resolved, ["every.preview=1", "data.prior=null"]).recipe     # class pictures are not looked at
    from finetune.train import checkpoint, ground, preview, setup

    def draw(step: int, base: list | None) -> list:
        found = preview.columns(recipe, grounded.family, method, base, step)
        preview.save(folder.preview(step), recipe, found, step)
        print(folder.preview(step), flush=True)
        return found[0]

    accelerator = setup.accelerate(recipe)
    grounded = ground.load(recipe, accelerator, lambda line: None)
    if grounded.weights != begun["exact"]["base"]:
        raise FinetuneError(f"{recipe.base.path} is not the base that {args.run} was begun with")
    method = setup.install(recipe, grounded)
    grounded.family.parts["denoiser"].to(accelerator.device)
    base = None if folder.preview(0).exists() else draw(0, None)        # what nothing was learned by yet
    while True:
        goes_on = folder.owner()        # asked first: its last checkpoint is seen below
        for path in reversed(checkpoint.folders(folder)):
            if not folder.preview(step := checkpoint.step(path)).exists():
                try:
                    state = checkpoint.load(path)
                except FileNotFoundError:       # training has removed it meanwhile
                    continue
                except checkpoint.DAMAGED as e:
                    raise FinetuneError(f"{path} is damaged ({e}); the train command sets it aside when it goes on") from None
                method.restore(state.ema or {name: state.parameters[name] for name in method.parameters()})
                base = draw(step, base)
        if not goes_on:
            return 0
        time.sleep(WAIT)
