"""SIGKILL before a write-class system call on the run folder and the cache, and after half a write; then the same command.

    python scripts/faults/kill.py --method lora [--sample 40] [--seed 0] [--random 20]

Survived is what ends with the adapter's bytes and the log of the run that nobody disturbed. Without --sample every call is
killed before, and every write torn; --random adds kills at random times. Prints N/N; exits with 1 unless all survived.
"""

import random
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from harness import KILL, OFF, TEAR, Case, arguments, chosen, reference, restarted  # noqa: E402


def main(words: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--random", type=int, default=0, metavar="N", help="kills at random times")
    args = parser.parse_args(words)
    restarted()
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        place = Path(folder)
        recipe, met, wanted, seconds = reference(args.method, place)
        calls = [(KILL, k) for k in range(1, len(met) + 1)]
        calls += [(TEAR, k) for k, call in enumerate(met, 1) if call.startswith("write ")]
        calls = [calls[i - 1] for i in chosen(len(calls), args.sample, args.seed)]
        draw = random.Random(args.seed)
        times = [draw.uniform(0, seconds) for _ in range(args.random)]
        print(f"{args.method}: {len(met)} calls in {seconds:.1f} s; {len(calls)} kills at calls, {len(times)} at times", flush=True)
        survived = sum(killed(Case(place / "case", recipe), wanted, mode, k) for mode, k in calls)
        survived += sum(killed(Case(place / "case", recipe), wanted, OFF, 0, time) for time in times)
    print(f"{args.method}: {survived}/{len(calls) + len(times)} kills end with the same bytes")
    return survived < len(calls) + len(times)


def killed(case: Case, wanted: dict[str, str], mode: int, k: int, after: float | None = None) -> bool:
    first = case.start(mode, k, after=after)
    where = f"{'torn' if mode == TEAR else 'before'} {' '.join(first.calls)}" if mode else f"after {after:.2f} s"
    why = "" if first.code == -signal.SIGKILL or mode == OFF else f"ended with {first.code}: {first.said[-2000:]}"
    if not why:
        again = case.start()
        found = case.outcome() if again.code == 0 else {}
        if found != wanted:
            why = f"rerun ended with {again.code}: {again.said[-2000:]}" if again.code else \
                f"other: {[name for name in wanted | found if wanted.get(name) != found.get(name)]}"
    case.clear()
    if why:
        print(f"LOST {where}: {why}", flush=True)
    return not why


if __name__ == "__main__":
    sys.exit(main())
