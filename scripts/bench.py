"""Measure what a training step costs, by the real `finetune train` on bases of a published model's size with random weights.

    python scripts/bench.py [CASE …] [--steps 6] [--threads N] [--json FILE]        one process for each case, and a table
    python scripts/bench.py --against [--rounds 2]                                  beside scripts/reference_loop.py,
                                                                                    in bfloat16 with --set base.dtype=bfloat16
    python scripts/bench.py --list

Bases are made once in runs/bench (sd15: 4.3 GB, sdxl: 7 GB), pictures and caches anew in a temporary folder. Columns:
s/step     median from step to step, log line and data included, without the first two steps and the last
TFLOP/s    by torch's counter over one step; %peak is the share of this machine's best square matrix product, in the same process
%outside   share of the time between steps that is not in the denoiser's (or decoder's) forward and backward; on the CPU alone
peak       MiB up to the last step: resident on the CPU, allocated on CUDA, where `reserved` is what torch holds beside that
unmapped   of it without pages of mapped files, such as float32 weights, which the system may drop and read again
end        MiB up to the end, with export and proof
start      seconds from the start of the process to the first step, of these `cache` for encoding pictures and captions
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
HOME = SCRIPTS.parent / "runs" / "bench"
DROPPED = 2


def case(base: str, resolution: int, method: dict, **train) -> dict:
    return {"base": base, "resolution": resolution, "method": method, "train": train}


LORA = {"kind": "lora", "rank": 8, "targets": ["cross_attention"]}
ALL = {"kind": "lora", "rank": 16, "targets": ["all"]}
BF16 = {"mixed_precision": "bf16"}
CASES = {
    "tiny": case("tiny", 64, {"kind": "lora", "rank": 4, "targets": ["cross_attention"]}, batch_size=4),
    "sd15-lora-256": case("sd15", 256, LORA),
    "sd15-lora-all-256": case("sd15", 256, ALL),
    "sd15-lora-512": case("sd15", 512, LORA),
    "sd15-full-256": case("sd15", 256, {"kind": "full"}, dtype="bfloat16"),
    "sd15-embedding-256": case("sd15", 256, {"kind": "embedding", "tokens": {"sks-thing": {"init": "circle"}}}),
    "sd15-vae-256": case("sd15", 256, {"kind": "vae_decoder"}),
}
CUDA = {    # named to be asked for: too large for a CPU
    "sd15-lora-512-b1": case("sd15", 512, ALL, dtype="bfloat16", **BF16),
    "sd15-lora-512-b32": case("sd15", 512, ALL, dtype="bfloat16", batch_size=32, **BF16),
    "sd15-full-512-b32": case("sd15", 512, {"kind": "full"}, dtype="bfloat16", batch_size=32, **BF16),
    "sdxl-lora-1024-b1": case("sdxl", 1024, ALL, dtype="bfloat16", **BF16),
    "sdxl-lora-1024-b4": case("sdxl", 1024, ALL, dtype="bfloat16", batch_size=4, **BF16),
}
COLUMNS = [     # heading, key, format
    ("case", "case", "{}"), ("s/step", "seconds", "{:.3f}"), ("img/s", "images", "{:.2f}"), ("TFLOP/s", "tflops", "{:.3f}"),
    ("%peak", "share", "{:.0%}"), ("%outside", "outside", "{:.1%}"), ("peak", "peak_mb", "{:,}"), ("unmapped", "anonymous_mb", "{:,}"),
    ("reserved", "reserved_mb", "{:,}"), ("end", "end_mb", "{:,}"), ("start", "start_seconds", "{:.1f}"), ("cache", "cache_seconds", "{:.1f}"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--against", action="store_true", help="sd15-lora-256 and the reference loop in turn")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="6; 60 for the tiny base")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="of every case's recipe: to see a lever's effect")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("RECIPE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(measured(*args.one, args.set)))
    if args.list:
        return print("\n".join([*CASES, *(f"{name}    (CUDA)" for name in CUDA)]))
    names = args.cases or ["sd15-lora-256"] if args.against else args.cases or list(CASES)
    if unknown := [name for name in names if name not in CASES | CUDA]:
        parser.error(f"no such case: {', '.join(unknown)}; --list names them")
    if args.steps is not None and args.steps < 5:
        parser.error(f"--steps {args.steps}: the first two, the last and the one before it are not counted; take 5 or more")
    found = {"machine": machine(), "load": os.getloadavg(), "settings": {"steps": args.steps, "threads": args.threads, "set": args.set}}
    if args.against:
        found["against"] = against(names[0], args)
    else:
        found["cases"] = []
        for name in names:
            found["cases"].append(once(name, args))
            print("\n" + table(found["cases"]), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"\n{found['machine']}\nload before {found['load'][0]:.1f}", flush=True)


def once(name: str, args) -> dict:
    """A case in a process of its own."""
    what = (CASES | CUDA)[name]
    steps = args.steps or (60 if what["base"] == "tiny" else 6)
    train = what["train"] | {"max_steps": steps} | ({"threads": args.threads} if args.threads else {})
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        family = "sdxl" if what["base"] == "sdxl" else "sd1"
        recipe = {"base": {"family": family, "path": base(what["base"]), "dtype": train.pop("dtype", "float32")},
                  "data": {"images": pictures(Path(folder), what["resolution"]), "resolution": what["resolution"]},
                  "method": what["method"], "train": train, "every": {"log": 10}}
        if what["method"]["kind"] == "embedding":
            recipe["data"]["caption"] = {"template": "a picture of sks-thing"}
        path = Path(folder, f"{name}.yaml")
        path.write_text(json.dumps(recipe), encoding="utf-8")
        extra = [word for order in args.set for word in ("--set", order)]
        found = child([sys.executable, __file__, "--one", path, folder, *extra], folder)
    return {"case": name, **found} if found else {"case": f"{name} (failed)"}


def child(command: list, folder: str) -> dict | None:
    """The JSON object that a command prints last; None when it fails."""
    environment = os.environ | {"FINETUNE_CACHE": f"{folder}/cache", "PYTHONPATH": str(SCRIPTS.parent)}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout[done.stdout.index("\n{") if "\n{" in done.stdout else 0:]) if done.returncode == 0 else None


def against(name: str, args) -> dict:
    """Both loops in turn, on one base, the same pictures and the same layers. Prints the ratios."""
    what, found = CASES[name], {"ours": [], "reference": [], "reference cached": []}
    threads = ["--threads", args.threads] if args.threads else []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        images = pictures(Path(folder), what["resolution"])
        command = [sys.executable, SCRIPTS / "reference_loop.py", "--base", base(what["base"]), "--images", images, "--resolution",
                   what["resolution"], "--rank", what["method"]["rank"], "--steps", args.steps or 6, *threads,
                   *(["--bf16"] if "base.dtype=bfloat16" in args.set else [])]
        for _ in range(args.rounds):
            found["ours"].append(once(name, args))
            for kind, extra in (("reference", []), ("reference cached", ["--cached"])):
                one = child([*command, *extra], folder)
                found[kind].append(one | {"seconds": statistics.median(one["seconds"][DROPPED:-1])})
    best = {kind: min(run["seconds"] for run in runs) for kind, runs in found.items()}
    peak = {kind: max(run.get("end_mb", run["peak_mb"]) for run in runs) for kind, runs in found.items()}
    print(f"\n{'':<18}{'s/step':>10}{'peak MiB':>10}   LoRA of rank {what['method']['rank']} on cross-attention, {what['resolution']} px, batch 1")
    for kind in found:
        print(f"{kind:<18}{best[kind]:>10.3f}{peak[kind]:>10,}   "
              + (f"ours: {best[kind] / best['ours']:.2f} × its steps/s, {peak['ours'] / peak[kind]:.2f} × its memory" if kind != "ours" else ""))
    return found


def base(name: str) -> str:
    if name == "tiny":
        return name
    command = [sys.executable, SCRIPTS / "random_base.py", name, HOME / name, "--dtype", "float16" if name == "sdxl" else "float32"]
    if not (HOME / name / "model_index.json").is_file():
        subprocess.run([str(word) for word in command], check=True, env=os.environ | {"PYTHONPATH": str(SCRIPTS.parent)})
    return str(HOME / name)


def pictures(folder: Path, side: int) -> str:
    """Eight captioned pictures of that size."""
    import random

    from PIL import Image, ImageDraw

    where, rng = folder / "pictures", random.Random(0)
    where.mkdir()
    rows = []
    for number, colour in enumerate(("red", "orange", "yellow", "green", "cyan", "blue", "purple", "black")):
        image = Image.new("RGB", (side, side), "white")
        for _ in range(4):
            x, y, r = (rng.uniform(0.2, 0.8) * side for _ in range(3))
            ImageDraw.Draw(image).ellipse([x - r / 4, y - r / 4, x + r / 4, y + r / 4], fill=colour)
        image.save(where / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": f"{colour} circles on white"}))
    (where / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return str(where)


def machine() -> dict:
    from importlib.metadata import version

    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "accelerate")}}


def table(runs: list[dict]) -> str:
    used = [column for column in COLUMNS if any(run.get(column[1]) is not None for run in runs)]
    rows = [[head for head, _, _ in used]] + [
        [how.format(run[key]) if run.get(key) is not None else "" for _, key, how in used] for run in runs]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(f"{cell:{'>' if n else '<'}{width}}" for n, (cell, width) in enumerate(zip(row, widths))) for row in rows)


# ---- inside a case's own process


def memory() -> dict[str, int]:
    """MiB: VmHWM, RssAnon and others, as the system counts them."""
    lines = (line.split() for line in open("/proc/self/status"))
    return {words[0].rstrip(":"): int(words[1]) // 1024 for words in lines if len(words) == 3 and words[2] == "kB"}


def measured(recipe: str, folder: str, overrides: list[str]) -> dict:
    """Run `finetune train` in this process, with a watch on its loop."""
    import psutil
    import torch

    from finetune import device
    from finetune.cli import main as finetune
    from finetune.train import ground, loop
    from finetune.train.plan import counter

    found, entries, inside, cuda = {"cache_seconds": 0.0}, [], [], torch.cuda.is_available()
    settings = json.loads(Path(recipe).read_text(encoding="utf-8"))
    steps, batch = settings["train"]["max_steps"], settings["train"].get("batch_size", 1)
    one_step, encoded, began = loop.one_step, ground.encoded, psutil.Process().create_time()

    def now():
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def watched_encoded(*arguments):
        begin = time.perf_counter()
        result = encoded(*arguments)
        found["cache_seconds"] = time.perf_counter() - begin
        return result

    def watched_step(run, step, batches):
        if not entries:
            found["start_seconds"] = time.time() - began
            watch(run, inside, found)
        if step == steps - 1:
            found["peak_mb"] = torch.cuda.max_memory_allocated() // 2**20 if cuda else memory()["VmHWM"]
            with counter() as flops:
                result = one_step(run, step, batches)
            found["flops"] = flops.get_total_flops()
            return result
        entries.append(now())
        inside.append(0.0)
        return one_step(run, step, batches)

    loop.one_step, ground.encoded = watched_step, watched_encoded
    code = finetune(["train", recipe, "--run", f"{folder}/run", *(word for order in overrides for word in ("--set", order))])
    assert code == 0, code
    found |= {"end_mb": torch.cuda.max_memory_allocated() // 2**20 if cuda else memory()["VmHWM"],
              "reserved_mb": torch.cuda.max_memory_reserved() // 2**20 if cuda else None}
    if cuda:
        torch.cuda.synchronize()
    between = [a.elapsed_time(b) / 1000 if cuda else b - a for a, b in zip(entries, entries[1:])][DROPPED:]
    outside = [1 - within / whole for within, whole in zip(inside[DROPPED:], between)]
    half = torch.bfloat16 if settings["train"].get("mixed_precision") == "bf16" else torch.float32
    ceiling, seconds = device.product_rate(half) / 1e12, statistics.median(between)
    return found | {"seconds": seconds, "all_seconds": between, "images": batch / seconds, "outside": None if cuda else statistics.median(outside),
                    "tflops": found["flops"] / seconds / 1e12, "ceiling_tflops": ceiling, "share": found["flops"] / seconds / 1e12 / ceiling,
                    "device": torch.cuda.get_device_name() if cuda else "cpu", "threads": torch.get_num_threads()}


def watch(run, inside: list[float], found: dict) -> None:
    """Add the seconds in the network's forward and in the backward to the step's number; note memory when all activations are held."""
    parts, begun = run.family.parts, []
    network = parts["denoiser"] if run.method.objective == "denoise" else parts["vae"].decoder

    def ended(*_) -> None:
        inside[-1] += time.perf_counter() - begun.pop()

    network.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter()))
    network.register_forward_hook(ended)
    backward = run.accelerator.backward

    def watched(loss) -> None:
        found["anonymous_mb"] = max(found.get("anonymous_mb", 0), memory()["RssAnon"])
        begun.append(time.perf_counter())
        backward(loss)
        ended()

    run.accelerator.backward = watched


if __name__ == "__main__":
    main()
