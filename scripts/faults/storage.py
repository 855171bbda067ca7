"""No space, an I/O error or a read-only disk at a write-class system call; then the same command on a sound disk.

    python scripts/faults/storage.py --method lora [--sample 40] [--seed 0] [--tmpfs 10]

The k-th call fails with ENOSPC, EIO or EROFS, alone or with all that come after it. Good is a run that either goes on, because
what failed may be missing (the cache), or ends with exit code 2, a message that names the fault and no traceback; that keeps
every checkpoint that was complete; and that ends, started again, with the bytes of the undisturbed one. --tmpfs, which needs
root, does the same on a real file system of 8 MB, so many times with as little room left as is drawn. Prints N/N.
"""

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from harness import FAIL, FAIL_ON, Case, End, arguments, chosen, reference, restarted  # noqa: E402

FAULTS = (errno.ENOSPC, errno.EIO, errno.EROFS)
DISK = 8 * 2**20


def main(words: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--tmpfs", type=int, default=0, metavar="N", help="full disks")
    args = parser.parse_args(words)
    restarted()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="storage-") as folder:
        recipe, calls, wanted, seconds = reference(args.method, Path(folder))
        cases = [(k, fault) for k in range(1, len(calls) + 1) for fault in FAULTS]
        cases = [cases[i - 1] for i in chosen(len(cases), args.sample, args.seed)]
        print(f"{args.method}: {len(calls)} calls in {seconds:.1f} s; {len(cases)} faults, {args.tmpfs} full disks", flush=True)
        case = Case(Path(folder) / "case", recipe)
        good = sum(met(case, wanted, calls, k, fault, draw.choice((FAIL, FAIL_ON))) for k, fault in cases)
        size = sum(p.stat().st_blocks * 512 for p in (Path(folder) / "whole").rglob("*"))
        good += sum(full(case, wanted, draw.randrange(size)) for _ in range(args.tmpfs))
    print(f"{args.method}: {good}/{len(cases) + args.tmpfs} storage faults are told, lose no checkpoint, and end with the same bytes")
    return good < len(cases) + args.tmpfs


def met(case: Case, wanted: dict[str, str], calls: list[str], k: int, fault: int, mode: int) -> bool:
    end = case.start(mode, k, fault)
    complete = [call.split()[1] for call in calls[:k - 1] if call.startswith("rename run/checkpoints/step-")]
    why = told(end, fault)
    if not why and complete and end.code and not sound(case.place / complete[-1]):
        why = f"{complete[-1]} is not what it was"
    return ended(case, wanted, why, f"{os.strerror(fault)}{' from here on' if mode == FAIL_ON else ''} at {' '.join(end.calls)}")


def full(case: Case, wanted: dict[str, str], room: int) -> bool:
    """The start sees that the disk is too small; one that another program fills meanwhile is met while writing."""
    case.place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", case.place], check=True)
    try:
        refused = case.start()
        (case.place / "other").write_bytes(bytes(max(0, shutil.disk_usage(case.place).free - room)))
        end = case.start(first=unforeseen)
        why = told(end, errno.ENOSPC)
        if refused.code != 2 or "MB free, but the run may need" not in refused.said:
            why = f"the start does not see it: {refused.code} {refused.said[-500:]}"
        why = why or next((f"{path.name} is damaged" for path in case.run.glob("checkpoints/step-*") if not sound(path)), "")
        (case.place / "other").unlink()
        return ended(case, wanted, why, f"a disk with {room} bytes left", unforeseen)
    finally:
        subprocess.run(["umount", case.place], check=True)
        case.clear()


def unforeseen() -> None:
    from finetune.runfolder import RunFolder

    RunFolder.check_room = lambda folder, needed: None


def told(end: End, fault: int) -> str:
    """What is wrong with how the run ended."""
    if end.code not in (0, 2) or "Traceback" in end.said:
        return f"ended with {end.code}: {end.said[-2000:]}"
    return f"does not name the fault: {end.said[-500:]}" if end.code and os.strerror(fault) not in end.said else ""


def ended(case: Case, wanted: dict[str, str], why: str, fault: str, first=lambda: None) -> bool:
    """The same command on a sound disk, unless something was wrong already."""
    if not why:
        again = case.start(first=first)
        if again.code or case.outcome() != wanted:
            why = f"rerun ended with {again.code}: {again.said[-2000:]}"
    case.clear()
    if why:
        print(f"BAD {fault}: {why}", flush=True)
    return not why


def sound(checkpoint: Path) -> bool:
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return all(hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() == seal["sha256"] for name, seal in files.items())


if __name__ == "__main__":
    sys.exit(main())
