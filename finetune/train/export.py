"""From what was trained to files that are proven to hold it."""

import json
import re
import shutil
from base64 import b64encode
from collections import Counter
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import torch

from finetune import __version__
from finetune.artifact import Artifact, weights_of
from finetune.data.loader import Stream
from finetune.disk import write_text
from finetune.errors import FinetuneError
from finetune.families import base as families
from finetune.formats import _tokens
from finetune.formats import base as formats
from finetune.formats import single_file
from finetune.runfolder import RunFolder
from finetune.tokens import hidden
from finetune.train import verify
from finetune.train.preview import resting
from finetune.train.sampling import generate, previews
from finetune.train.setup import Run

MOST_TAGS = 1000        # ComfyUI shows no metadata of more than a megabyte
# An absolute path or one that climbs, within any text. Not a web address, and not and/or.
PATH = re.compile(r"(?<![\w.:/\\])(?:file:/+|[A-Za-z]:[/\\]|~\w*/|\.{1,2}/|/|\\\\)(?:[^/\\\s\"',]+[/\\])+[^/\\\s\"',]*")
HOME = re.compile(r".*[/\\](?:home|Users)[/\\][^/\\]+[/\\]?")
TOKEN = re.compile(r"\b(?:hf|api|sk|ghp)_[A-Za-z0-9]{16,}\b")


def write(artifacts: dict[str, Artifact], folder: RunFolder, format_names: list[str], family) -> list[Path]:
    """One file per artifact and format, each opened again and compared; a whole model is a folder or a single file, an
    extracted LoRA a file for most tools. Raises FinetuneError rather than hand over a bad adapter."""
    paths, spec = [], family.spec
    for title, artifact in artifacts.items():
        check(artifact)
        if artifact.kind == "full":
            dtype = next(family.parts["denoiser"].parameters()).dtype
            with hidden(family):
                for name in format_names:
                    if name == "single_file":
                        paths.append(folder.adapter(name, True, title))
                        single_file.write(family, paths[-1], dtype, artifact.metadata)
                    else:
                        paths.append(folder.adapters / folder.name)
                        families.write(family, paths[-1], dtype)
            continue
        for i, name in enumerate(["kohya"] if "finetune.extracted" in artifact.metadata else format_names):
            path = folder.adapter(name, i == 0, title)
            if artifact.kind == "control":      # diffusers wants a folder
                path = path.with_suffix("")
                family.parts["control"].save_config(path)
            formats.save(artifact, weights_of(path), name, spec)
            again, own = formats.load(path, spec).tensors, artifact.tensors
            same = again.keys() == own.keys() and all(torch.equal(again[name], t) for name, t in own.items())
            assert same, f"{path}: what was written is not what was trained"
            paths.append(path)
    return paths


def prove(run: Run, paths: list[Path]) -> dict[str, list[verify.Check]]:
    """Check each file against the training model; verify.json keeps the result.

    Raises FinetuneError when one fails, or when a part of the base is no longer there to check with, after renaming what is
    not proven to NAME.refused: nothing keeps the name of a good file that is none."""
    try:
        results = checked(run, paths)
    except Exception as e:
        files = " and ".join(str(refused(path)) for path in paths)
        if isinstance(e, FinetuneError):
            raise FinetuneError(f"{e}\n    so the adapter is not proven to work, and is renamed to {files}") from None
        raise
    write_text(run.folder.adapters / "verify.json", verify.as_json(results))
    for path in paths:
        if not all(check.passed for check in results[path.name]):
            raise FinetuneError(f"the adapter is not proven to work and is renamed to {refused(path)}; the checkpoints stay\n"
                                + verify.table(results[path.name]))
    return results


def refused(path: Path) -> Path:
    """The file, or folder, under a name that nobody takes for a proven one's."""
    aside = path.with_suffix(".refused")
    shutil.rmtree(aside, ignore_errors=True)        # of an earlier try
    return path.replace(aside)


def checked(run: Run, paths: list[Path]) -> dict[str, list[verify.Check]]:
    expected = {}
    for strength in verify.STRENGTHS:
        with run.method.at(strength):
            decodes = run.method.objective == "decode"
            expected[strength] = verify.drawn(run.family.parts["vae"]) if decodes else verify.probe(run.family)
    with run.method.at(0):
        tokens = {token: states for method in run.method.methods if method.kind == "embedding"
                  for token, states in said(run, method).items()}
        return {path.name: verify.verify(path, run.family, tokens.get(_tokens.token(path), expected)) for path in paths}


def said(run: Run, method) -> dict[str, dict[float, torch.Tensor]]:
    """What the text encoder makes of each learned token: {token: {strength of the method alone: states}}."""
    found: dict[str, dict[float, torch.Tensor]] = {token: {} for token in method.words.tokens}
    for strength in (0.0, 1.0):
        with method.at(strength):
            for token in method.words.tokens:
                found[token][strength] = verify.states(run.family, token)
    return found


def check(artifact: Artifact) -> None:
    """Raise FinetuneError for an adapter that is not finite, as it is or multiplied out, or changes nothing."""
    advice = {"finite": "lower train.learning_rate and start again with --fresh",
              "not zero": "raise train.learning_rate or train.max_steps"}
    for each in verify.numbers(artifact):
        if not each.passed:
            raise FinetuneError(f"the adapter is not written ({each.name}: {each.found}); {advice[each.name]}")


def metadata(run: Run) -> dict[str, str]:
    """What every file of the run says about itself, as A1111, Forge and SD.Next show it: the part of the recipe that decides
    the trained numbers, base and data by name and fingerprint. Nothing private: an adapter travels."""
    recipe, base, name = run.identity["exact"]["recipe"], run.family.source.name, run.folder.name
    learned = run.loader.streams[0]
    images = [{"path": _name(source.path), "repeats": source.repeats} for source in run.recipe.data.images]
    adapters = [{"path": Path(a.path).name, "strength": a.strength} for a in run.recipe.base.adapters]
    replaced = {part: _name(path) for part, path in run.recipe.base.parts.items()}
    told = recipe | {"base": recipe["base"] | {"path": base, "adapters": adapters} | replaced,
                     "data": {"images": images} | named(recipe["data"])}
    told["method"] = [method | ({"start_from": Path(words.start_from).name} if method.get("start_from") else {})
                      for method, words in zip(recipe["method"], run.recipe.method)]
    train, caption = told["train"], run.recipe.data.caption
    words = [word for word in (caption.trigger, *(token for method in run.method.methods if method.kind == "embedding"
                                                  for token in method.words.tokens)) if word]
    folders = {image["path"]: image["repeats"] for image in images}
    sizes = Counter(f"{w}x{h}" for h, w in learned.sizes.tolist())
    described = {
        "finetune.version": __version__,
        "finetune.recipe": json.dumps(public(told), sort_keys=True, ensure_ascii=False),
        "finetune.base": json.dumps(run.identity["exact"]["base"], sort_keys=True),
        "finetune.data": run.identity["exact"]["data"],
        "ss_output_name": name,
        "ss_sd_model_name": base,
        "ss_vae_name": replaced.get("vae", ""),
        "ss_clip_skip": str(skip) if (skip := run.recipe.base.clip_skip) > 1 else "",
        "ss_steps": str(train["max_steps"]),
        "ss_max_train_steps": str(train["max_steps"]),
        "ss_num_train_images": str(learned.index.repeats.sum()),
        "ss_num_batches_per_epoch": str(learned.order.steps * train["gradient_accumulation"]),
        "ss_num_epochs": str(-(-train["max_steps"] // learned.order.steps)),
        "ss_batch_size_per_device": str(train["batch_size"]),
        "ss_gradient_accumulation_steps": str(train["gradient_accumulation"]),
        "ss_learning_rate": str(train["learning_rate"]),
        "ss_lr_scheduler": train["schedule"]["kind"],
        "ss_optimizer": train["optimizer"],
        "ss_mixed_precision": train["mixed_precision"],
        "ss_seed": str(train["seed"]),
        "ss_resolution": f"({told['data']['resolution']}, {told['data']['resolution']})",
        "ss_dataset_dirs": json.dumps({folder: {"n_repeats": repeats} for folder, repeats in folders.items()}),
        "ss_bucket_info": json.dumps({"buckets": {str(i): {"resolution": [int(n) for n in size.split("x")], "count": count}
                                                  for i, (size, count) in enumerate(sorted(sizes.items()))}}),
        "ss_tag_frequency": json.dumps({" ".join(folders): tag_frequency(learned)}, ensure_ascii=False),
        "modelspec.title": name,
        "modelspec.resolution": f"{told['data']['resolution']}x{told['data']['resolution']}",
        "modelspec.trigger_phrase": ", ".join(words),
    }
    shown = {"modelspec.thumbnail": thumbnail(run)} if run.recipe.preview.thumbnail else {}
    return {key: value for key, value in public(described).items() if value} | shown


def thumbnail(run: Run) -> str:
    """The first preview of what is trained now, as a data URI: up to 256 pixels a side, as modelspec wants it, some 10 KB."""
    with resting(run.family.parts):
        picture = next(generate(run.family.pipeline(), previews(run.recipe)[:1]))
    picture.thumbnail((256, 256))
    picture.convert("RGB").save(data := BytesIO(), "JPEG", quality=85)
    return f"data:image/jpeg;base64,{b64encode(data.getvalue()).decode()}"


def tag_frequency(learned: Stream) -> dict[str, int]:
    """The tags of the captions (what stands between commas) and how many pictures have each, the most frequent first."""
    captions = replace(learned.captions, dropout=0.0)
    counts = Counter(tag for row in range(len(learned.index)) for tag in {
        tag.strip() for tag in captions.caption(learned.index.columns(row), 0, row).split(",")} if tag)
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_TAGS])


def public(value):
    """The same without what is nobody's business: of a path the name, of a home nothing, and no access token."""
    if isinstance(value, dict):
        return {public(key): public(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(own) for own in value]
    if not isinstance(value, str):
        return value
    return TOKEN.sub("…", PATH.sub(lambda path: "~" if HOME.fullmatch(path[0]) else _name(path[0]), value))


def _name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def named(words, key: str = ""):
    """Words of a recipe with the name alone of every folder and file."""
    if isinstance(words, dict):
        return {key: named(own, key) for key, own in words.items()}
    if isinstance(words, list):
        return [named(own, key) for own in words]
    places = ("path", "images", "files", "source", "condition", "conditions", "start_from")
    return _name(words) if isinstance(words, str) and key in places else words
