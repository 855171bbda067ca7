"""A run of three epochs is killed before a step and goes on: from every step, once, twice or three times in a row.

    python scripts/faults/resume.py [--sample 40] [--seed 0]

Over workers {0, 2}, accumulation {1, 2}, EMA {on, off} and {adamw, adamw8bit, adafactor}. Every third start is killed twice
again and every other third once, at later steps that are drawn. Exact is what ends with the SHA-256 of the adapter, of the
last checkpoint (parameters, EMA, optimizer) and of the log of the run that nobody disturbed. Prints N/N.
"""

import argparse
import itertools
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from harness import Case, chosen, reference, restarted  # noqa: E402

STEPS = {1: 9, 2: 6}        # of three epochs of three pictures, by accumulation: the last step of an epoch may be smaller


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="so many of the starts, drawn; all if left out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    restarted()
    every = [(words, step) for words in itertools.product((0, 2), (1, 2), ("null", "{decay: 0.9}"), ("adamw", "adamw8bit", "adafactor"))
             for step in range(1, STEPS[words[1]])]
    wanted: dict[tuple, dict[str, str]] = {}
    exact = resumes = 0
    with tempfile.TemporaryDirectory(prefix="resume-") as folder:
        place = Path(folder)
        recipe = reference("lora", place)[0]
        cases = [every[n - 1] for n in chosen(len(every), args.sample, args.seed)]
        for number, (setting, step) in enumerate(cases):
            workers, accumulation, ema, optimizer = setting
            steps, case = STEPS[accumulation], Case(place / "case", recipe, (
                f"data.workers={workers}", f"train.gradient_accumulation={accumulation}", f"train.ema={ema}",
                f"train.optimizer={optimizer}", "train.batch_size=1", f"train.max_steps={STEPS[accumulation]}", "every.preview=0"))
            if setting not in wanted:
                end = case.start()
                assert end.code == 0, end.said
                wanted[setting] = case.outcome()
                case.clear()
            later = random.Random(f"{args.seed} {number}").sample(range(step + 1, steps), min(number % 3, steps - 1 - step))
            stops = [step, *sorted(later)]
            exact += resumed(case, stops, wanted[setting])
            resumes += len(stops)
    print(f"{exact}/{len(cases)} runs, resumed {resumes} times, end with the same adapter, optimizer and log")
    return exact < len(cases)


def resumed(case: Case, stops: list[int], wanted: dict[str, str]) -> bool:
    """Killed before each of the steps in turn, and then let be."""
    codes = [case.start(first=lambda: die_before(step)).code for step in stops]
    last = case.start()
    found = case.outcome() if last.code == 0 else {}
    case.clear()
    good = found == wanted and set(codes) == {-signal.SIGKILL} and f"continues after step {stops[-1]} " in last.said
    if not good:
        print(f"OTHER {case.words} at {stops}: {codes}, {last.code} {last.said[-2000:]}\n"
              f"{[name for name in wanted | found if wanted.get(name) != found.get(name)]}", flush=True)
    return good


def die_before(step: int) -> None:
    from finetune.train import loop

    real = loop.one_step

    def one_step(run, at, batches):
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(run, at, batches)

    loop.one_step = one_step


if __name__ == "__main__":
    sys.exit(main())
