"""Second starts on a run folder while the first one trains: all are refused, and the first does not notice.

    python scripts/faults/second_start.py [--sample 100]

Every other one comes by a symbolic link, and every third with --fresh.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from harness import ROOT, recipe  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=100)
    count = parser.parse_args(arguments).sample
    with tempfile.TemporaryDirectory(prefix="second-") as folder:
        place = Path(folder)
        environment = {**os.environ, "FINETUNE_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1",
                       "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        command = [sys.executable, "-m", "finetune", "train", str(recipe(place / "given", "lora")),
                   "--set", "train.max_steps=1000000", "--set", "every.preview=0", "--set", "every.checkpoint=0", "--run"]
        (place / "link").symlink_to(place / "run")
        first = subprocess.Popen([*command, str(place / "run")], env=environment, stderr=subprocess.DEVNULL)
        try:
            while not (place / "run" / "metrics.jsonl").exists():
                assert first.poll() is None
                time.sleep(0.5)
            refused = 0
            for n in range(count):
                second = subprocess.run([*command, str(place / ("link" if n % 2 else "run")), *["--fresh"] * (n % 3 == 0)],
                                        env=environment, capture_output=True, text=True)
                good = second.returncode == 2 and f"in use by process {first.pid}" in second.stderr
                refused += good
                if not good:
                    print(f"STARTED {n}: {second.returncode} {second.stderr[-500:]}", flush=True)
            assert first.poll() is None, "the first run ended"
        finally:
            first.terminate()
            code = first.wait(60)
    print(f"{refused}/{count} second starts are refused; the first ended, when told to, with {code}")
    return refused < count or code != 143


if __name__ == "__main__":
    sys.exit(main())
