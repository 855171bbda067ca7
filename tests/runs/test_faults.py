"""A drawn sample of each program in scripts/faults, which see to far more when they are run by hand (docs/faults.md)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("words", ["canaries --sample 8", "flips --sample 40", "kill --sample 2", "not_finite --sample 4",
                                   "second_start --sample 2", "storage --sample 1"], ids=lambda words: words.split()[0])
def test_a_sample_of(words):
    program, *options = words.split()
    done = subprocess.run([sys.executable, ROOT / "scripts" / "faults" / f"{program}.py", *options], capture_output=True,
                          text=True, timeout=600, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    count = options[-1]
    assert done.returncode == 0 and f"{count}/{count} " in done.stdout, done.stdout + done.stderr[-3000:]
