"""Hold `finetune plan` against what training really allocates, on a few shapes.

    python scripts/bench_plan.py [--large] [--json FILE]

Each shape is a real `finetune train` of three steps in a process of its own. On CUDA the peak is max_memory_allocated. On the CPU
it is what torch asks its allocator for, as its profiler reports it for the second step, and the weights that are held then: resident
memory also has the process, mapped files, and what the allocator keeps. --large adds shapes of SD 1.5's size (made by bench.py).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import bench

LORA = {"kind": "lora", "rank": 4, "targets": ["cross_attention"]}
SHAPES = {      # base, resolution, method, train
    "tiny lora 64 b1": ("tiny", 64, LORA, {}),
    "tiny lora 64 b8": ("tiny", 64, LORA, {"batch_size": 8}),
    "tiny lora all 128 b2": ("tiny", 128, LORA | {"targets": ["all"]}, {"batch_size": 2}),
    "tiny lora 128 b4 checkpointed": ("tiny", 128, LORA, {"batch_size": 4, "gradient_checkpointing": True}),
    "tiny lora 128 b4 selective": ("tiny", 128, LORA, {"batch_size": 4, "gradient_checkpointing": "selective"}),
    "tiny full 64 b4": ("tiny", 64, {"kind": "full"}, {"batch_size": 4, "optimizer": "adamw"}),
    "tiny vae 64 b4": ("tiny", 64, {"kind": "vae_decoder"}, {"batch_size": 4}),
}
LARGE = {
    "sd15 lora 256 b1": ("sd15", 256, LORA, {}),
    "sd15 lora 512 b1 checkpointed": ("sd15", 512, LORA, {"gradient_checkpointing": True}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", metavar="RECIPE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(measured(args.one)))
    rows = []
    print(f"{'shape':<32}{'planned MiB':>14}{'measured MiB':>14}{'off by':>9}", flush=True)
    for name, (base, resolution, method, train) in (SHAPES | (LARGE if args.large else {})).items():
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            recipe = Path(folder, "shape.yaml")
            recipe.write_text(json.dumps({
                "base": {"path": bench.base(base)}, "method": method, "train": train | {"max_steps": 3}, "every": {"checkpoint": 0},
                "data": {"images": bench.pictures(Path(folder), resolution), "resolution": resolution}}), encoding="utf-8")
            found = bench.child([sys.executable, __file__, "--one", recipe], folder)
        rows.append({"shape": name} | (found or {}))
        if found:
            print(f"{name:<32}{found['planned']:>14,.1f}{found['measured']:>14,.1f}{found['planned'] / found['measured'] - 1:>9.1%}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": bench.machine(), "shapes": rows}, indent=1) + "\n", encoding="utf-8")


def measured(recipe: str) -> dict:
    """MiB of the plan and of the run, in this process."""
    import torch

    from finetune.cli import main as finetune
    from finetune.recipe import load
    from finetune.train import loop
    from finetune.train.plan import needs

    need, found, one_step = needs(load(recipe).recipe), {}, loop.one_step

    def watched(run, step, batches):
        if step != 1:
            return one_step(run, step, batches)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            result = one_step(run, step, batches)
            found["peak"] = torch.cuda.max_memory_allocated()
            return result
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for part in run.family.parts.values()
                for t in (*part.parameters(), *part.buffers())}
        held |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for own in run.optimizer.optimizer.state.values()
                 for t in own.values() if isinstance(t, torch.Tensor)}
        copies = [method.weights.base for method in run.method.methods if hasattr(method, "weights")]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = one_step(run, step, batches)
        now = peak = 0
        memory = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(memory, key=lambda e: e.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        found["peak"] = peak + sum(held.values()) + sum(t.nbytes for copy in copies for t in copy.values())
        return result

    loop.one_step = watched
    code = finetune(["train", recipe, "--run", str(Path(recipe).parent / "run")])
    assert code == 0, code
    return {"planned": max(size for phase, size in need.phases.items() if phase in ("training", "optimizer step")) / 2**20,
            "measured": found["peak"] / 2**20}


if __name__ == "__main__":
    main()
