"""NaN and infinity in a loss, a gradient, latents or a weight: no adapter is contaminated.

    python scripts/faults/not_finite.py [--sample 200] [--seed 0]

A bad loss or gradient has to be skipped and named, and the run has to end well; bad latents have to end it with the file's
name, a bad weight with the last good checkpoint. Whatever happens, an adapter that is there is finite. Prints N/N.
"""

import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])]
from harness import arguments, recipe  # noqa: E402

VALUES = (float("nan"), float("inf"), float("-inf"))
KINDS = ("loss", "gradient", "latent", "weight")


def main(words: list[str] | None = None) -> int:
    args = arguments(__doc__, 200).parse_args(words)
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="numbers-") as folder:
        path = recipe(Path(folder) / "given", "lora")
        clean = sum(injected(Path(folder), path, KINDS[n % len(KINDS)], draw) for n in range(args.sample))
    print(f"{clean}/{args.sample} injected numbers that are not finite leave no contaminated adapter")
    return clean < args.sample


def injected(place: Path, recipe: Path, kind: str, draw: random.Random) -> bool:
    import torch
    from accelerate.state import AcceleratorState
    from safetensors.torch import load_file

    from finetune.cli import main as finetune
    from finetune.families._unet import UNetFamily
    from finetune.train import loop

    run, value, at, steps = place / "run", draw.choice(VALUES), draw.randrange(3), loop.one_step
    moments, victim = UNetFamily.moments, draw.random()
    os.environ["FINETUNE_CACHE"] = str(place / ("latent" if kind == "latent" else "cache"))

    def one_step(run, step, batches):
        name, p = sorted(run.parameters.items())[int(victim * len(run.parameters))]
        forward, hook = run.model.forward, None
        if step == at and kind == "loss":
            run.model.forward = lambda batch: forward(batch) * value
        if step == at and kind == "gradient":
            hook = p.register_hook(lambda g: g.index_fill(0, torch.tensor([0]), value))
        result = steps(run, step, batches)
        run.model.forward = forward
        if hook:
            hook.remove()
        if step == at and kind == "weight":
            p.data.view(-1)[int(victim * p.numel())] = value
        return result

    def bad(self, x):
        found = moments(self, x)
        found.view(-1)[int(victim * found.numel())] = value
        return found

    said = io.StringIO()
    AcceleratorState._reset_state(reset_partial_state=True)
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), patch.object(loop, "one_step", one_step), \
            patch.object(UNetFamily, "moments", bad if kind == "latent" else moments):
        options = ["--set", "every.preview=0", "--set", f"train.optimizer={draw.choice(('adamw', 'adamw8bit', 'adafactor'))}"]
        code = finetune(["train", str(recipe), "--run", str(run), *options])
    files = list((run / "adapter").glob("*.safetensors"))
    why = [f"{path.name} is not finite" for path in files for t in load_file(path).values() if not t.isfinite().all()]
    if kind in ("loss", "gradient"):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] if run.exists() else []
        if code or not files or [line["step"] for line in lines if "skipped" in line] != [at + 1]:
            why.append("not skipped")
    elif code != 2 or files or ".png" not in said.getvalue() and kind == "latent":
        why.append("not refused")
    shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(place / "latent", ignore_errors=True)
    if why:
        print(f"BAD {value} in a {kind} at step {at + 1}, exit {code}: {why}\n{said.getvalue()[-1500:]}", flush=True)
    return not why


if __name__ == "__main__":
    sys.exit(main())
