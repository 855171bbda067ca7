"""No space, an I/O error or a read-only disk at a write-class system call; then the same command on a sound disk.

    python scripts/faults/storage.py --method lora [--sample 40] [--seed 0]

The k-th call fails with ENOSPC, EIO or EROFS, alone or with all that come after it. Good is a run that either goes on, because
what failed may be missing (the cache), or ends with exit code 2, a message that names the fault and no traceback; that keeps
every checkpoint that was complete; and that ends, started again, with the bytes of the undisturbed one. Prints N/N.
"""

import errno
import hashlib
import json
import os
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from harness import FAIL, FAIL_ON, Case, arguments, chosen, reference, restarted  # noqa: E402

FAULTS = (errno.ENOSPC, errno.EIO, errno.EROFS)


def main() -> int:
    args = arguments(__doc__).parse_args()
    restarted()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="storage-") as folder:
        recipe, calls, wanted, seconds = reference(args.method, Path(folder))
        cases = [(k, fault) for k in range(1, len(calls) + 1) for fault in FAULTS]
        cases = [cases[i - 1] for i in chosen(len(cases), args.sample, args.seed)]
        print(f"{args.method}: {len(calls)} calls in {seconds:.1f} s; {len(cases)} faults", flush=True)
        good = sum(met(Case(Path(folder) / "case", recipe), wanted, calls, k, fault, draw.choice((FAIL, FAIL_ON)))
                   for k, fault in cases)
    print(f"{args.method}: {good}/{len(cases)} storage faults are told, lose no checkpoint, and end with the same bytes")
    return good < len(cases)


def met(case: Case, wanted: dict[str, str], calls: list[str], k: int, fault: int, mode: int) -> bool:
    end, why = case.start(mode, k, fault), ""
    if end.code not in (0, 2) or "Traceback" in end.said:
        why = f"ended with {end.code}: {end.said[-2000:]}"
    elif end.code == 2 and os.strerror(fault) not in end.said:
        why = f"does not name the fault: {end.said[-500:]}"
    elif complete := [call.split()[1] for call in calls[:k - 1] if call.startswith("rename run/checkpoints/step-")]:
        why = "" if sound(case.place / complete[-1]) or end.code == 0 else f"{complete[-1]} is not what it was"
    if not why:
        again = case.start()
        if again.code or case.outcome() != wanted:
            why = f"rerun ended with {again.code}: {again.said[-2000:]}"
    case.clear()
    if why:
        print(f"BAD {os.strerror(fault)}{' from here on' if mode == FAIL_ON else ''} at {' '.join(end.calls)}: {why}", flush=True)
    return not why


def sound(checkpoint: Path) -> bool:
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return all(hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() == seal["sha256"] for name, seal in files.items())


if __name__ == "__main__":
    sys.exit(main())
