"""Flipped bits, cut files and deleted files in checkpoints and in the cache: all are found before anything uses them.

    python scripts/faults/flips.py [--sample 1000] [--seed 0]

One tiny run is trained. Then, again and again, one file is damaged, everything is read as a run reads it, and the file is
put back. Found is what is refused or made anew; a damage that changes no value that is read does not count against it.
"""

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="flips-") as folder:
        trained(Path(folder))
        found = sum(attempt(Path(folder), random.Random(args.seed * 10**6 + n)) for n in range(args.sample))
    print(f"{found}/{args.sample} flips, cuts and deletions are found before use")
    return found < args.sample


def trained(place: Path) -> None:
    from harness import recipe

    os.environ["FINETUNE_CACHE"] = str(place / "cache")
    from finetune.cli import main as finetune

    assert finetune(["train", str(recipe(place / "given", "lora")), "--run", str(place / "run")]) == 0


def attempt(place: Path, draw: random.Random) -> bool:
    """Damage one file, read all as a run would, put it back."""
    files = sorted(p for below in ("run/checkpoints", "cache") for p in (place / below).rglob("*")
                   if p.is_file() and p.stat().st_size and not p.name.startswith("."))
    victim = draw.choice(files)
    data, before = victim.read_bytes(), values(place)
    kind = draw.choice(("flip", "flip", "cut", "delete"))
    if kind == "flip":
        spot = draw.randrange(len(data))
        victim.write_bytes(data[:spot] + bytes([data[spot] ^ 1 << draw.randrange(8)]) + data[spot + 1:])
    elif kind == "cut":
        victim.write_bytes(data[:draw.randrange(len(data))])
    else:
        victim.unlink()
    try:
        now = values(place)
        wrong = [name for name, value in now.items() if value is not None and value != before.get(name)]
    except Exception as e:
        wrong = [f"{type(e).__name__}: {e}"]
    victim.write_bytes(data)
    if wrong:
        print(f"USED {kind} of {victim.relative_to(place)}: {wrong[:3]}", flush=True)
    return not wrong


def values(place: Path) -> dict[str, object]:
    """Everything that a run would take from checkpoints and cache; None for what it refuses."""
    from finetune.data.cache import Cache, read_index
    from finetune.data.memory import Memory
    from finetune.errors import FinetuneError
    from finetune.train import checkpoint

    found: dict[str, object] = {}
    for path in sorted((place / "run" / "checkpoints").glob("step-*")):
        try:
            state = checkpoint.load(path)
            tensors = {**state.parameters, **state.optimizer, **{f"ema {n}": t for n, t in (state.ema or {}).items()}}
            found[path.name] = state.step, str(state.plain), {name: t.numpy().tobytes() for name, t in tensors.items()}
        except (FinetuneError, OSError, ValueError, KeyError):
            found[path.name] = None
    cache = Cache(place / "cache" / "encoded", lambda line: None)
    for kind in ("moments", "text"):
        for index in cache.folder.glob(f"{kind}-*.index"):
            import numpy as np

            keys = np.unique(read_index(index)["key"])
            for key, where in zip(keys, cache.find(kind, keys)):
                entry = cache.read(bytes(key), where)
                found[f"{kind} {bytes(key)!r}"] = entry and {name: t.numpy().tobytes() for name, t in entry.items()}
    memory = Memory(place / "cache" / "index", lambda line: None)
    for path in (place / "cache" / "index").glob("*.arrow"):
        kind, _, name = path.stem.partition("-")
        table = memory.load(kind, name)
        found[path.name] = table and table.to_pylist()
    return found


if __name__ == "__main__":
    sys.exit(main())
