"""Say what is running in a run folder, or in all of runs/: step, loss, speed, time left."""

from pathlib import Path


def add_arguments(parser) -> None:
    parser.add_argument("run", nargs="?", type=Path, help="a run folder; every one in runs/ if left out")
    parser.add_argument("--json", action="store_true")


def run(args) -> int:
    import json

    from finetune.errors import FinetuneError
    from finetune.runfolder import RunFolder

    folders = [args.run] if args.run else runs()
    if args.run and not (args.run / "run.json").is_file():
        raise FinetuneError(f"{args.run} is no run folder: it has no run.json")
    rows = [facts(RunFolder(folder, folder.name)) for folder in folders]
    if args.json:
        print(json.dumps(rows, indent=1))
    elif not rows:
        print("no runs in runs/")
    for row in rows if not args.json else []:
        name, speed = row["run"] if len(row["run"]) <= 22 else f"…{row['run'][-21:]}", row["images_per_second"]
        words = [f"{name:<22} {row['state']:<8} {row['step']}/{row['max_steps']}",
                 *([] if row["loss"] is None else [f"loss {row['loss']:.4f}"]), *([f"{speed:.3g} img/s"] if speed else []),
                 *([] if row["seconds_left"] is None else [f"{clock(row['seconds_left'])} left"])]
        print("  ".join(words))
    return 0


def runs() -> list[Path]:
    """The run folders in runs/, by name."""
    return sorted(path.parent for path in Path("runs").glob("*/run.json"))


def facts(folder) -> dict:
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
