"""A small drawn sample of every program here, in one process that imports once: what the tests run.

    python scripts/faults/samples.py

Those that fork come first: a process that has trained should not be forked.
"""

import importlib
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])]
from harness import restarted  # noqa: E402

SAMPLES = {"kill": "--sample 2", "storage": "--sample 1", "resume": "--sample 2", "stops": "--sample 1",
           "commands": "--command sample --command cache --command convert --sample 3", "stream": "--draws 200",
           "second_start": "--sample 2", "not_finite": "--sample 4", "flips": "--sample 40", "canaries": "--sample 8"}


def main() -> int:
    restarted()
    failed = [name for name, words in SAMPLES.items() if importlib.import_module(name).main(words.split())]
    print(f"{len(SAMPLES) - len(failed)}/{len(SAMPLES)} programs", *failed)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
