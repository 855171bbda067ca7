"""From what was trained to files that are proven to hold it."""

import json
from pathlib import Path

import torch

from finetune import __version__
from finetune.artifact import WHOLE, Artifact, modules
from finetune.change import core
from finetune.errors import FinetuneError
from finetune.families import base as families
from finetune.formats import base as formats
from finetune.runfolder import RunFolder, write_text
from finetune.tokens import hidden
from finetune.train import verify
from finetune.train.setup import Run


def write(artifacts: dict[str, Artifact], folder: RunFolder, format_names: list[str], family) -> list[Path]:
    """One file per artifact and format, each opened again and compared; a whole model is a folder, an extracted LoRA a file
    for most tools. Raises FinetuneError rather than hand over a bad adapter."""
    paths, spec = [], family.spec
    for title, artifact in artifacts.items():
        check(artifact)
        if artifact.kind == "full":
            paths.append(folder.adapters / folder.name)
            with hidden(family):
                families.write(family, paths[-1], next(family.parts["denoiser"].parameters()).dtype)
            continue
        for i, name in enumerate(["kohya"] if "finetune.extracted" in artifact.metadata else format_names):
            path = folder.adapter(name, i == 0, title)
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
            decodes = run.method.objective == "decode"
            expected[strength] = verify.drawn(run.family.parts["vae"]) if decodes else verify.probe(run.family)
    with run.method.at(0):
        tokens = {token: states for method in run.method.methods if method.kind == "embedding"
                  for token, states in said(run, method).items()}
        results = {path.name: verify.verify(path, run.family, tokens.get(formats.token(path), expected)) for path in paths}
    write_text(run.folder.adapters / "verify.json", verify.as_json(results))
    for path in paths:
        if not all(check.passed for check in results[path.name]):
            refused = path.replace(path.with_suffix(".refused"))
            raise FinetuneError(f"the adapter is not proven to work and is renamed to {refused}; the checkpoints stay\n"
                                + verify.table(results[path.name]))
    return results


def said(run: Run, method) -> dict[str, dict[float, torch.Tensor]]:
    """What the text encoder makes of each learned token: {token: {strength of the method alone: states}}."""
    found: dict[str, dict[float, torch.Tensor]] = {token: {} for token in method.tokens}
    for strength in (0.0, 1.0):
        with method.at(strength):
            for token in method.tokens:
                found[token][strength] = verify.states(run.family, token)
    return found


def check(artifact: Artifact) -> None:
    """Raise FinetuneError for an adapter that is not finite, as it is or multiplied out, or changes nothing."""
    bad, moved = [name for name, t in artifact.tensors.items() if not t.isfinite().all()], False
    whole = artifact.kind in (*WHOLE, "embedding")
    for (part, path), module in modules(artifact.tensors).items() if not whole else ():
        change = core(module)
        moved |= bool(change.any())
        bad += [] if change.isfinite().all() else [f"{part}.{path}"]
    if bad:
        raise FinetuneError(f"{len(bad)} trained tensors are not finite ({min(bad)}, …): no adapter is written; "
                            "lower train.learning_rate and start again with --fresh")
    if not (whole or moved):
        raise FinetuneError("the adapter changes nothing: no adapter is written; raise train.learning_rate or train.max_steps")


def metadata(run: Run) -> dict[str, str]:
    """What every file of the run says about itself: the part of the recipe that decides the trained numbers, with the
    names of base and pictures but without the private paths to them, for an adapter travels."""
    recipe, base, name = run.identity["exact"]["recipe"], run.family.source.name, run.folder.name
    learned = run.loader.streams[0]
    images = [{"path": source.path.rstrip("/").rpartition("/")[2], "repeats": source.repeats} for source in run.recipe.data.images]
    adapters = [{"path": Path(a.path).name, "strength": a.strength} for a in run.recipe.base.adapters]
    methods = [method | ({"start_from": Path(method["start_from"]).name} if method.get("start_from") else {})
               for method in recipe["method"]]
    public = recipe | {"base": recipe["base"] | {"path": base, "adapters": adapters}, "method": methods,
                       "data": {"images": images} | recipe["data"]}
    train = public["train"]
    return {
        "finetune.version": __version__,
        "finetune.recipe": json.dumps(public, sort_keys=True, ensure_ascii=False),
        "finetune.data": run.identity["exact"]["data"],
        "ss_output_name": name,
        "ss_sd_model_name": base,
        "ss_steps": str(train["max_steps"]),
        "ss_max_train_steps": str(train["max_steps"]),
        "ss_num_train_images": str(learned.index.repeats.sum()),
        "ss_num_batches_per_epoch": str(learned.order.steps * train["gradient_accumulation"]),
        "ss_batch_size_per_device": str(train["batch_size"]),
        "ss_gradient_accumulation_steps": str(train["gradient_accumulation"]),
        "ss_learning_rate": str(train["learning_rate"]),
        "ss_lr_scheduler": train["schedule"]["kind"],
        "ss_optimizer": train["optimizer"],
        "ss_mixed_precision": train["mixed_precision"],
        "ss_seed": str(train["seed"]),
        "ss_resolution": f"({public['data']['resolution']}, {public['data']['resolution']})",
        "modelspec.title": name,
        "modelspec.resolution": f"{public['data']['resolution']}x{public['data']['resolution']}",
    }
