"""Say what is running in a run folder, or in all of runs/: step, loss, speed, time left."""

import json
from pathlib import Path

from finetune.errors import FinetuneError
from finetune.runfolder import RunFolder


def add_arguments(parser) -> None:
    parser.add_argument("run", nargs="?", type=Path, help="a run folder; every one in runs/ if left out")
    parser.add_argument("--json", action="store_true")


def run(args) -> int:
    rows = [row(folder) for folder in ([RunFolder.of(args.run).root] if args.run else runs())]
    if args.run and "trouble" in rows[0]:
        raise FinetuneError(rows[0]["trouble"])
    if args.json:
        print(json.dumps(rows, indent=1))
    elif not rows:
        print("no runs in runs/")
    for one in rows if not args.json else []:
        name = one["run"] if len(one["run"]) <= 22 else f"…{one['run'][-21:]}"
        print(f"{name:<22} {one['state']:<8} {one['trouble'] if 'trouble' in one else progress(one)}")
    return 0


def progress(row: dict) -> str:
    speed = row["images_per_second"]
    return "  ".join([f"{row['step']}/{row['max_steps']}", *([] if row["loss"] is None else [f"loss {row['loss']:.4f}"]),
                      *([f"{speed:.3g} img/s"] if speed else []),
                      *([] if row["seconds_left"] is None else [f"{clock(row['seconds_left'])} left"])])


def runs() -> list[Path]:
    return sorted(path.parent for path in Path("runs").glob("*/run.json"))


def row(folder: Path) -> dict:
    """What the folder's files say, or, of damaged ones, what the trouble is."""
    try:
        return facts(RunFolder(folder, folder.name))
    except (FinetuneError, OSError, OverflowError) as e:
        trouble = str(e) if isinstance(e, FinetuneError) else f"{folder} cannot be read: {e}"
        return {"run": str(folder), "state": "damaged", "trouble": trouble}


def facts(folder: RunFolder) -> dict:
    """What the folder's files say; a run without a holder is finished or stopped."""
    exact = folder.known()["exact"]
    train = exact["recipe"]["train"]
    # Other lines name a skipped step or an alarm.
    last = next((line for line in reversed(folder.logged()) if "images_per_second" in line), {})
    done, owner = last.get("step", 0), folder.owner()
    state = "running" if owner else "finished" if done == train["max_steps"] and any(folder.adapters.glob("*.safetensors")) \
        else "stopped"
    per_step = train["batch_size"] * train["gradient_accumulation"] * exact["processes"]
    speed = last.get("images_per_second")
    return {"run": str(folder.root), "state": state, "pid": owner and owner["pid"], "step": done,
            "max_steps": train["max_steps"], "loss": last.get("loss"), "images_per_second": speed,
            "seconds_left": round((train["max_steps"] - done) * per_step / speed) if owner and speed else None}


def clock(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
