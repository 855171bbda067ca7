"""Tiny runs of every method in processes of their own, in which a chosen system call kills or fails.

A process imports everything once and forks for each run, so that a run costs a second or two; what is forked has trained
nothing, and its death is that of a real process. The shim (shim.c) is compiled with cc and preloaded by starting anew.
"""

import argparse
import ctypes
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OFF, COUNT, KILL, TEAR, FAIL, FAIL_ON = range(6)        # as in shim.c
SECONDS = 300       # after which a run counts as hanging

LORA = "method: {kind: lora, rank: 2, alpha: 1, dropout: 0.1}"
METHODS = {
    "lora": LORA,
    "dreambooth": LORA,
    "embedding": "method: {kind: embedding, tokens: {zkw: {init: circle}}}",
    "full": "method: {kind: full, targets: [to_k]}",
    "vae_decoder": "method: {kind: vae_decoder}",
}
ADVICE = {"dreambooth": ", prior: {prompt: a circle, count: 2, steps: 2}",
          "embedding": ", caption: {template: '{text} zkw'}"}


def base(folder: Path) -> Path:
    """The tiny base with one block in its UNet and two in its VAE, of random weights: what counts here are bytes."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    shutil.copytree(ROOT / "finetune" / "assets" / "tiny", folder)
    torch.manual_seed(0)
    UNet2DConditionModel(16, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
                         block_out_channels=(32,), layers_per_block=1, cross_attention_dim=128, attention_head_dim=4,
                         norm_num_groups=8).save_pretrained(folder / "unet")
    AutoencoderKL(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
                  up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8).save_pretrained(folder / "vae")
    return folder


def recipe(folder: Path, method: str) -> Path:
    """Three steps with three checkpoints, previews, and everything on that an exact resume could miss."""
    from PIL import Image

    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    for name, colour in (("a", "red"), ("b", "green"), ("c", "blue")):
        Image.new("RGB", (40, 36), colour).save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(f"a {colour} circle")
    path = folder / f"{method}.yaml"
    path.write_text(f"""
base: {{family: sd1, path: "{base(folder / "base")}"}}
data: {{images: "{pictures}", resolution: 32{ADVICE.get(method, "")}}}
{METHODS[method]}
train: {{max_steps: 3, batch_size: 2, learning_rate: 1e-2, optimizer: adamw, ema: {{decay: 0.9}}, threads: 1}}
every: {{log: 2, checkpoint: 1, preview: {0 if method == "vae_decoder" else 3}}}
preview: {{prompts: [a circle], steps: 1}}
""")
    return path


def restarted() -> None:
    """Start this program anew with the shim, once."""
    if "FAULTS_SHIM" in os.environ:
        return
    shim = Path(tempfile.mkdtemp(prefix="faults-")) / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, Path(__file__).with_name("shim.c"), "-ldl"], check=True)
    os.execve(sys.executable, [sys.executable, *sys.argv], {
        **os.environ, "LD_PRELOAD": str(shim), "FAULTS_SHIM": str(shim), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"})


@dataclass(frozen=True)
class End:
    code: int           # negative: the signal that it died of
    said: str
    calls: list[str]    # those counted, or the one that was met
    seconds: float      # since its signal


@dataclass(frozen=True)
class Case:
    """A run folder and a cache of its own, both in `place`; `words` are `--set` for the recipe. Or another `command`, which
    writes there."""

    place: Path
    recipe: Path
    words: tuple[str, ...] = ()
    command: tuple[str, ...] = ()

    @property
    def run(self) -> Path:
        return self.place / "run"

    def start(self, mode: int = OFF, at: int = 0, error: int = 0, number: int = signal.SIGKILL, after: float | None = None,
              first: Callable[[], None] = lambda: None) -> End:
        """`finetune train`, or the command, in a new process, which calls `first` first: to its end, or until signal `number` comes, `after`
        seconds from its start."""
        self.place.mkdir(parents=True, exist_ok=True)
        said, trace = self.place.with_suffix(".said"), self.place.with_suffix(".calls")
        pid = os.fork()
        if pid == 0:
            self._child(said, trace, mode, at, error, first)
        begin = sent = time.monotonic()
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            age = time.monotonic() - begin
            if after is not None and age > after:
                os.kill(pid, number)
                sent, after = time.monotonic(), None
            if age > SECONDS:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        return End(os.waitstatus_to_exitcode(status), said.read_text(errors="replace"), trace.read_text().splitlines(),
                   time.monotonic() - sent)

    def _child(self, said: Path, trace: Path, mode: int, at: int, error: int, first: Callable[[], None]) -> None:
        code = 70
        try:
            out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(out, 1)
            os.dup2(out, 2)
            counted = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.environ["FINETUNE_CACHE"] = str(self.place / "cache")
            signal.signal(signal.SIGINT, signal.default_int_handler)       # a shell's background job ignores it
            first()
            ctypes.CDLL(os.environ["FAULTS_SHIM"]).faults_arm(
                str(self.place).encode(), mode, ctypes.c_long(at), error, counted)
            from finetune.cli import main

            code = main(self.command or ["train", str(self.recipe), "--run", str(self.run),
                                         *(word for own in self.words for word in ("--set", own))])
            if mode == COUNT:
                self.place.with_suffix(".modules").write_text("\n".join(sys.modules))
        except SystemExit as e:
            code = e.code
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        finally:
            os._exit(code)

    def outcome(self) -> dict[str, str]:
        """What came out: a hash of every file of the adapter and of the last checkpoint, and the log without its speeds."""
        last = max((self.run / "checkpoints").glob("step-*"))
        files = {str(p.relative_to(self.run)): hashlib.sha256(p.read_bytes()).hexdigest()
                 for folder in (self.run / "adapter", last) for p in sorted(folder.rglob("*")) if p.is_file()}
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        plain = [{key: value for key, value in line.items() if key not in ("images_per_second", "memory_mb")}
                 for line in lines]
        return files | {"log": json.dumps(plain)}

    def ends(self, wanted: dict[str, str], what: str, wrong: str = "", first: Callable[[], None] = lambda: None) -> bool:
        """Whether nothing is wrong yet and the same command, given again, ends with the wanted outcome. `what` was done is
        printed where not. The case is cleared."""
        if not wrong:
            again = self.start(first=first)
            found = self.outcome() if again.code == 0 else {}
            if found != wanted:
                wrong = f"the rerun ended with {again.code}: {again.said[-2000:]}" if again.code else \
                    f"others: {[name for name in wanted | found if wanted.get(name) != found.get(name)]}"
        shutil.rmtree(self.place, ignore_errors=True)
        if wrong:
            print(f"BAD {what}: {wrong}", flush=True)
        return not wrong


    def import_all(self) -> None:
        """What it imported when its calls were counted, so that no other process has to."""
        for name in self.place.with_suffix(".modules").read_text().splitlines():
            with suppress(Exception):
                importlib.import_module(name)


def arguments(description: str, sample: int = 0) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--sample", type=int, default=sample, metavar="N", help="so many, drawn; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def reference(method: str, place: Path, words: tuple[str, ...] = ()) -> tuple[Path, list[str], dict[str, str], float]:
    """The recipe, and of the undisturbed run the calls, what came out, and the seconds."""
    import finetune.train.loop      # noqa: F401

    path = recipe(place / "given", method)
    whole, again = (Case(place / name, path, words) for name in ("whole", "again"))
    end = whole.start(COUNT)
    assert end.code == 0, end.said
    whole.import_all()
    begin = time.monotonic()
    assert again.start().code == 0 and again.outcome() == whole.outcome(), "two undisturbed runs differ"
    return path, end.calls, whole.outcome(), time.monotonic() - begin


def chosen(count: int, sample: int, seed: int) -> list[int]:
    """1 … count, or a sample of them."""
    every = range(1, count + 1)
    return list(every) if not sample or sample >= count else sorted(random.Random(seed).sample(every, sample))
