"""SIGTERM and SIGINT at random times; then the same command. No optimizer step is lost, and none is made twice.

    python scripts/faults/stops.py [--sample 100] [--seed 0]

A run of 40 steps that saves at its end alone gets one of the two at a time drawn from its duration. Good is a stop whose exit
code says so, whose newest checkpoint has every step that was made, and after which the rest is made and ends with the bytes
of the undisturbed run. Prints N/N, and how long the slowest stop took.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from harness import Case, reference, restarted  # noqa: E402

STEPS = 40


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    restarted()
    draw, good, slowest = random.Random(args.seed), 0, 0.0
    with tempfile.TemporaryDirectory(prefix="stops-") as folder:
        place = Path(folder)
        words = (f"train.max_steps={STEPS}", "every.checkpoint=0", "every.preview=0")
        recipe, _, wanted, seconds = reference("lora", place, words)
        for _ in range(args.sample):
            number, after = draw.choice((signal.SIGTERM, signal.SIGINT)), draw.uniform(0, seconds)
            fine, took = stopped(Case(place / "case", recipe, words), wanted, number, after)
            good, slowest = good + fine, max(slowest, took)
    print(f"{good}/{args.sample} stops lose no step and end with the same bytes; the slowest took {slowest:.2f} s")
    return good < args.sample


def stopped(case: Case, wanted: dict[str, str], number: int, after: float) -> tuple[bool, float]:
    made = case.place.with_name("made")
    made.write_text("")
    first = case.start(number=number, after=after, first=lambda: count_steps(made))
    before = made.read_text().split()
    saved = [int(p.name.removeprefix("step-")) for p in (case.run / "checkpoints").glob("step-*")]
    again = case.start(first=lambda: count_steps(made))
    fine = (first.code in (0, 128 + number) or first.code == -number and not before) and max(saved, default=0) == len(before) \
        and again.code == 0 and made.read_text().split() == [str(step) for step in range(STEPS)] and case.outcome() == wanted
    case.clear()
    if not fine:
        print(f"LOST {signal.Signals(number).name} after {after:.2f} s, {len(before)} steps: {first.code} {first.said[-1000:]}\n"
              f"saved {saved}, again {again.code} {again.said[-1000:]}", flush=True)
    return fine, first.seconds


def count_steps(made: Path) -> None:
    from finetune.train import loop

    real, log = loop.one_step, os.open(made, os.O_WRONLY | os.O_APPEND)

    def one_step(run, step, batches):
        result = real(run, step, batches)
        os.write(log, f"{step}\n".encode())
        return result

    loop.one_step = one_step


if __name__ == "__main__":
    sys.exit(main())
