"""A drawn sample of each program in scripts/faults, which see to far more when they are run by hand (docs/faults.md)."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_sample_of_each():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "faults" / "samples.py"], capture_output=True, text=True,
                          timeout=1200)
    assert done.returncode == 0 and "10/10 programs" in done.stdout, done.stdout + done.stderr[-3000:]
