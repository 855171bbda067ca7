"""A run as a model repository of the Hugging Face hub: the proven files, a picture, and a card that says what they are.

Nothing private goes out: of folders and files the recipe on the card has the names alone."""

import re
import shutil
from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from finetune import __version__
from finetune.disk import read_json, writing
from finetune.errors import FinetuneError
from finetune.recipe import Recipe
from finetune.recipe.resolved import written
from finetune.train.evaluate import Result, table
from finetune.train.export import named, public
from finetune.train.report import Told, told

HERE = {    # how diffusers gets a file straight from the repository
    "lora": 'pipe.load_lora_weights("{to}", weight_name="{file}")',
    "embedding": 'pipe.load_textual_inversion("{to}", weight_name="{file}", token="{stem}")',
    "vae_decoder": 'AutoencoderKL.from_single_file("https://huggingface.co/{to}/blob/main/{file}")',
    "control": 'ControlNetModel.from_pretrained("{to}")',
    "full": 'DiffusionPipeline.from_pretrained("{to}")'}


def check_name(to: str) -> None:
    """Raise FinetuneError for what is no USER/NAME."""
    try:
        validate_repo_id(to)
        if to.count("/") != 1:
            raise HFValidationError("user/name is needed")
    except HFValidationError as e:
        raise FinetuneError(f"--to {to}: {e}") from None


def write(run: Path, out: Path, to: str, licence: str) -> list[Path]:
    """Fill a folder. Raises FinetuneError for a run without proven files, and for a folder with other things in it."""
    known = told(run)
    proof = known.proof
    if not proof:
        raise FinetuneError(f"{run}: is no run that is done and proven: it has no adapter/verify.json")
    missing = [name for name in proof if not (run / "adapter" / name).exists()]
    failed = [name for name, checks in proof.items() if not all(check.passed for check in checks)]
    if missing or failed:
        raise FinetuneError(f"{run}: {', '.join(missing + failed)} in adapter/ is not there, or not proven to work; only what "
                            "is proven is pushed")
    with writing(f"{out}:"):
        if out.exists() and any(out.iterdir()):
            raise FinetuneError(f"{out}: is not empty; name a new folder")
        out.mkdir(parents=True, exist_ok=True)
        for name in proof:
            file = run / "adapter" / name
            if file.is_dir():       # a whole model is the repository
                shutil.copytree(file, out, dirs_exist_ok=True)
            else:
                shutil.copyfile(file, out / name)
        shutil.copyfile(run / "adapter" / "verify.json", out / "verify.json")
        previews = sorted((run / "previews").glob("step-*.png"))
        if previews:
            shutil.copyfile(previews[-1], out / "preview.png")
        (out / "README.md").write_text(text(known, to, licence, bool(previews)), encoding="utf-8")
    return sorted(file for file in out.rglob("*") if file.is_file())


def text(run: Told, to: str, licence: str, pictured: bool) -> str:
    """The card: what the hub reads, then what people read."""
    recipe = run.recipe
    templates = [re.sub(r"\{\w*\}", "", choice.template).strip(" ,") for choice in recipe.data.caption.template]
    calls = [word for word in dict.fromkeys([recipe.data.caption.trigger, *templates, *(
        token for method in recipe.method if method.kind == "embedding" for token in method.tokens)]) if word]
    kinds, base = [method.kind for method in recipe.method], hub_id(recipe.base.path)
    head = ModelCardData(license=licence, base_model=base, library_name="diffusers", pipeline_tag="text-to-image",
                         tags=["finetune", recipe.base.family, *kinds], instance_prompt=", ".join(calls) or None)
    here = [HERE[kind].format(to=to, file=file, stem=Path(file).stem) for kind, (file, _) in zip(kinds, run.uses)]
    parts = [f"---\n{head.to_yaml().strip()}\n---", f"# {to.partition('/')[2]}", f"{line(run.sentence)}.",
             *(["![base beside what was trained](preview.png)"] if pictured else []),
             *(["## Words that call it", " · ".join(map(code, calls))] if calls else []),
             "## How to use it", fenced("\n".join(here), "python")]
    for file, tools in run.uses:
        parts += [f"{code(file)}:", "\n".join(f"- **{tool}**: {line(words)}" for tool, words in tools)]
    parts += ["## How it was trained", f"With finetune {__version__} and this recipe; what it leaves out is at its default.",
              fenced(written(spoken(recipe)), "yaml"), *measured(run), "## Proof",
              "\n".join(f"- {code(file)}: {len(checks)} checks passed ({line(', '.join(check.name for check in checks))})"
                        for file, checks in run.proof.items())]
    return "\n\n".join(parts) + "\n"


def hub_id(path: str) -> str | None:
    """The base as others can have it; a place on this machine is nobody's business."""
    fits = re.fullmatch(r"\w[\w.-]*/[\w.-]+", path)
    return path if fits and not Path(path).exists() else None


def spoken(recipe: Recipe) -> dict:
    """The recipe without its defaults, and with the names alone of folders and files."""
    whole = {word: {key: value for key, value in words.items() if value != {}} if isinstance(words, dict) else words
             for word, words in public(named(recipe.model_dump(mode="json", exclude_defaults=True))).items()}
    whole = {word: words for word, words in whole.items() if words}
    return whole | {"base": whole["base"] | {"path": hub_id(recipe.base.path) or whole["base"]["path"]}}


def measured(run: Told) -> list[str]:
    """The last losses, and the table of an eval that was written into a folder of the run."""
    last = {key: [each[key] for each in run.lines if each.get(key) is not None][-1:] for key in ("loss", "validation_loss")}
    said = [f"{key.replace('_', ' ')}: {value[0]:.4g}" for key, value in last.items() if value]
    tables = [table(read_json(file, Result)["metrics"])
              for file in sorted(run.folder.glob("*/eval.json"))]
    return ["## Numbers", "At the end, " + ", ".join(said) + ".", *map(fenced, tables)] if said or tables else []


def line(words: str) -> str:
    """Words of a user as plain text: nothing of them is markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", " ".join(words.split()))


def code(words: str) -> str:
    words = " ".join(words.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", words)), default=0))
    return f"{ticks} {words} {ticks}" if "`" in words else f"`{words}`"


def fenced(words: str, language: str = "") -> str:
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", words)), default=0))
    return f"{ticks}{language}\n{words.rstrip()}\n{ticks}"
