"""From what was trained to files that are proven to hold it."""

import json
from pathlib import Path

import torch

from finetune import __version__
from finetune.artifact import Artifact, deltas
from finetune.errors import FinetuneError
from finetune.formats import base as formats
from finetune.runfolder import RunFolder, write_text
from finetune.train import verify
from finetune.train.setup import Run


def write(artifact: Artifact, folder: RunFolder, format_names: list[str], spec) -> list[Path]:
    """One file per format, each opened again and compared. Raises FinetuneError rather than hand over a bad adapter."""
    check(artifact)
    paths = []
    for i, name in enumerate(format_names):
        path = folder.adapter(name, first=i == 0)
        formats.save(artifact, path, name, spec)
        again = formats.load(path, spec).tensors
        same = again.keys() == artifact.tensors.keys() and all(torch.equal(again[k], t) for k, t in artifact.tensors.items())
        assert same, f"{path}: what was written is not what was trained"
        paths.append(path)
    return paths


def prove(run: Run, paths: list[Path]) -> dict[str, list[verify.Check]]:
    """Check each file against the training model; verify.json keeps the result.

    Raises FinetuneError when one fails, after renaming it to NAME.refused: nothing bad keeps the name of a good file."""
    expected = {}
    for strength in verify.STRENGTHS:
        with run.method.at(strength):
            expected[strength] = verify.probe(run.family)
    results = {path.name: verify.verify(path, run.family, expected) for path in paths}
    write_text(run.folder.adapters / "verify.json", verify.as_json(results))
    for path in paths:
        if not all(check.passed for check in results[path.name]):
            refused = path.replace(path.with_suffix(".refused"))
            raise FinetuneError(f"the adapter is not proven to work and is renamed to {refused}; the checkpoints stay\n"
                                + verify.table(results[path.name]))
    return results


def check(artifact: Artifact) -> None:
    """Raise FinetuneError for an adapter that is not finite or changes nothing."""
    bad = sorted(name for name, t in artifact.tensors.items() if not t.isfinite().all())
    if bad:
        raise FinetuneError(f"{len(bad)} trained tensors are not finite ({bad[0]}, …): no adapter is written; "
                            "lower train.learning_rate and start again with --fresh")
    if not any(delta.any() for _, _, delta in deltas(artifact)):
        raise FinetuneError("the adapter changes nothing: no adapter is written; raise train.learning_rate or train.max_steps")


def metadata(run: Run) -> dict[str, str]:
    """What every file of the run says about itself: the part of the recipe that decides the trained numbers, with the
    names of base and pictures but without the private paths to them, for an adapter travels."""
    recipe, base, name = run.identity["exact"]["recipe"], run.family.source.name, run.folder.name
    examples, images = len(run.loader.examples), Path(run.recipe.data.images).name
    public = recipe | {"base": recipe["base"] | {"path": base}, "data": recipe["data"] | {"images": images}}
    train = public["train"]
    return {
        "finetune.version": __version__,
        "finetune.recipe": json.dumps(public, sort_keys=True, ensure_ascii=False),
        "finetune.data": run.identity["exact"]["data"],
        "ss_output_name": name,
        "ss_sd_model_name": base,
        "ss_steps": str(train["max_steps"]),
        "ss_max_train_steps": str(train["max_steps"]),
        "ss_num_train_images": str(examples),
        "ss_num_batches_per_epoch": str(max(1, examples // (train["batch_size"] * run.accelerator.num_processes))),
        "ss_batch_size_per_device": str(train["batch_size"]),
        "ss_gradient_accumulation_steps": str(train["gradient_accumulation"]),
        "ss_learning_rate": str(train["learning_rate"]),
        "ss_lr_scheduler": train["schedule"],
        "ss_optimizer": train["optimizer"],
        "ss_mixed_precision": train["mixed_precision"],
        "ss_seed": str(train["seed"]),
        "ss_resolution": f"({public['data']['resolution']}, {public['data']['resolution']})",
        "modelspec.title": name,
        "modelspec.resolution": f"{public['data']['resolution']}x{public['data']['resolution']}",
    }
