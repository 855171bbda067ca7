"""The page about a run, or about several side by side: one HTML file that asks nothing of any network.

It is made of what lies in the run folders and of the pictures that were learned from, as far as they are still there."""

import base64
import io
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from finetune.artifact import MEASURED
from finetune.data import pictures
from finetune.disk import read_json, write_text, writing
from finetune.errors import FinetuneError
from finetune.formats._identify import identify
from finetune.header import read_header
from finetune.recipe import Recipe, dump, load
from finetune.recipe.resolved import leaves
from finetune.runfolder import RunFolder
from finetune.train import ground
from finetune.train.curves import chart
from finetune.train.export import public
from finetune.train.lint import lint
from finetune.train.norms import measure
from finetune.train.verify import Proof

NAME = "report.html"
SHOWN, THUMBNAIL = 24, 144      # pictures of the data, and their longer side in pixels
WIDEST = 1600                   # of a preview, in pixels
NAMES = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT",
         "full": "Full fine-tuning", "control": "ControlNet", "vae_decoder": "VAE decoder", "embedding": "Learned tokens"}
CURVES = {"loss": "loss", "validation_loss": "loss on held-out pictures", "lr": "learning rate",
          "grad_norm": "norm of the gradient", "images_per_second": "pictures a second", "memory_mb": "memory in MB"}
USES = {    # kind of adapter → tool → what to do with the file, as the tools' own manuals have it
    "lora": {"ComfyUI": "put it into models/loras, add the node Load LoRA, strength 1",
             "A1111, Forge, SD.Next": "put it into models/Lora and write <lora:{stem}:1> into the prompt",
             "InvokeAI": "import it in the model manager, then add it under LoRAs",
             "stable-diffusion.cpp": "--lora-model-dir FOLDER, and <lora:{stem}:1> in the prompt",
             "diffusers": 'pipe.load_lora_weights("{file}")'},
    "embedding": {"ComfyUI": "put it into models/embeddings and write embedding:{stem} into the prompt",
                  "A1111, Forge, SD.Next": "put it into embeddings and write {stem} into the prompt",
                  "InvokeAI": "import it in the model manager and write <{stem}> into the prompt",
                  "diffusers": 'pipe.load_textual_inversion("{file}", token="{stem}")'},
    "vae_decoder": {"ComfyUI": "put it into models/vae, add the node Load VAE",
                    "A1111, Forge, SD.Next": "put it into models/VAE and choose it in the settings"},
    "control": {"ComfyUI": "put {file}/diffusion_pytorch_model.safetensors into models/controlnet, add the node Load "
                           "ControlNet Model",
                "diffusers": 'ControlNetModel.from_pretrained("{file}")', "finetune": "--adapter {file} --condition PICTURE"},
    "full": {"diffusers": 'DiffusionPipeline.from_pretrained("{file}")', "finetune": "--base {file}"},
}


@dataclass(frozen=True)
class Told:
    """What the page says of a run. Each thing is looked up when a page gets to it, since the pictures can be many."""

    folder: Path
    recipe: Recipe
    lines: list[dict]       # of metrics.jsonl
    proof: Proof            # adapter/verify.json

    @property
    def title(self) -> str:
        return self.folder.resolve().name

    @property
    def sentence(self) -> str:
        """What was trained, on what, for how long."""
        def said(method) -> str:
            rank = f" of rank {method.rank}" if getattr(method, "rank", None) else ""
            return NAMES[getattr(method, "variant", method.kind)] + rank

        recipe, train = self.recipe, self.recipe.train
        sources = ", ".join(Path(source.path).name for source in recipe.data.images)
        return (f"{' and '.join(map(said, recipe.method))} on {Path(recipe.base.path).name} ({recipe.base.family}), learned "
                f"from {sources} at {recipe.data.resolution} px for {train.max_steps:,} steps of "
                f"{train.batch_size * train.gradient_accumulation}")

    @property
    def files(self) -> list[Path]:
        return sorted((self.folder / "adapter").glob("*.safetensors"))

    @property
    def cards(self) -> dict[str, str]:
        """The numbers one looks for first."""
        steps, last = [line for line in self.lines if "loss" in line], f"of {self.recipe.train.max_steps:,}"
        if not steps:
            return {"steps": f"0 {last}"}
        losses = [line["loss"] for line in steps if line["loss"] is not None]       # None: every step of that line was skipped
        found = {"steps": f"{steps[-1]['step']:,} {last}",
                 "loss": f"{losses[0]:.4g} → {losses[-1]:.4g}" if losses else "not finite",
                 "speed": f"{statistics.median(line['images_per_second'] for line in steps):.3g} pictures/s",
                 "memory": f"{max(line['memory_mb'] for line in steps):,} MB"}
        if self.files:
            found["adapter"] = f"{self.files[0].stat().st_size / 1000:,.0f} KB"
        if self.proof:
            passed = all(check.passed for checks in self.proof.values() for check in checks)
            found["proof"] = "every check passed" if passed else "a check FAILED"
        return found

    @cached_property
    def previews(self) -> list[tuple[int, str]]:
        found = []
        for step, path in previews(self.folder).items():
            with suppress(OSError):     # a damaged one is left out
                found.append((step, picture(Image.open(path), WIDEST)))
        return found

    @cached_property
    def data(self) -> dict:
        """Thumbnails with captions, and what lint finds; or why there are none."""
        try:
            found, how, words = lint(self.recipe, lambda line: None), ground.reading(self.recipe), ground.words(self.recipe)
            index = ground.found(self.recipe, "learn", lambda line: None, True)
            chosen = np.unique(np.linspace(0, len(index) - 1, min(SHOWN, len(index))).round().astype(int)).tolist()
            shown = [(picture(pictures.read(index.read(i), index.name(i), how), THUMBNAIL), caption(words, index.columns(i)))
                     for i in chosen]
        except (FinetuneError, OSError) as e:
            return {"trouble": str(e), "counts": {}, "shown": [], "notes": []}
        return {"trouble": "", "counts": found.pictures, "shown": shown, "notes": found.notes}

    @property
    def norms(self) -> list[tuple[str, list]]:
        return [(path.name, bars) for path in self.files[:1] if (bars := norms(path))]

    @property
    def uses(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Of each method what to do with its file: (file, [(tool, words)])."""
        files = [name for name in self.proof if not name.endswith(".diffusers.safetensors")]
        return [(file, [(tool, words.format(stem=file.removesuffix(".safetensors"), file=file))
                        for tool, words in USES[method.kind].items()]) for method, file in zip(self.recipe.method, files)]

    @property
    def given(self) -> str:
        return public((self.folder / "recipe.yaml").read_text(encoding="utf-8", errors="replace"))      # a page travels

    @property
    def resolved(self) -> str:
        return public(dump(self.recipe))


def told(folder: Path) -> Told:
    """Raises FinetuneError for a folder whose recipe, log or proof cannot be read."""
    try:
        receipt = folder / "adapter" / "verify.json"
        return Told(folder, load(folder / "resolved.yaml").recipe, RunFolder(folder, folder.name).logged(),
                    read_json(receipt, Proof) if receipt.exists() else {})
    except OSError as e:
        raise FinetuneError(f"{folder}: is no run that can be told about: {e}") from None


def write(folders: Sequence[Path], out: Path) -> Path:
    """Write the page. Raises FinetuneError for a run that cannot be told about, or a page that cannot be written."""
    text = page(folders)
    with writing(f"{out}: the report"):
        write_text(out, text)
    return out


def page(folders: Sequence[Path], *blocks: str) -> str:
    """The HTML, or only these blocks of its template. Raises FinetuneError for a run that cannot be told about."""
    runs = [told(folder) for folder in folders]
    curves = {said: chart({run.title: [(line["step"], line[key]) for line in run.lines if line.get(key) is not None]
                           for run in runs}) for key, said in CURVES.items()}
    shown = {"runs": runs, "curves": {said: drawn for said, drawn in curves.items() if drawn},
             "differences": differences(runs)}
    whole = template("report.html")
    return "".join(part for block in blocks for part in whole.blocks[block](whole.new_context(shown))) if blocks \
        else whole.render(shown)


def template(name: str) -> jinja2.Template:
    return jinja2.Environment(loader=jinja2.PackageLoader("finetune", "assets"), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=jinja2.StrictUndefined).get_template(name)


def previews(folder: Path) -> dict[int, Path]:
    """Step → the sheet of pictures that was sampled then."""
    found = {path.stem.removeprefix("step-"): path for path in sorted((folder / "previews").glob("step-*.png"))}
    return {int(step): path for step, path in found.items() if step.isdecimal()}


def norms(path: Path) -> list[tuple[str, float, float]]:
    """Of each block its norm, and that as a share of the greatest; nothing for a file without low-rank changes."""
    facts = identify(read_header(path))
    if facts["kind"] not in MEASURED:
        return []
    found = measure(path, facts | {"problems": []}).get("norms", {})
    most = max(found.values(), default=0.0) or 1.0
    return [(block, size, size / most) for block, size in found.items()]


def caption(words, columns: dict[str, str]) -> str:
    """One that training could have drawn."""
    return words.caption(columns, 0, 0) if not words.missing(columns) else ""


def differences(runs: list[Told]) -> list[tuple[str, list[str]]]:
    """The fields of the recipes that are not the same in all runs, each with every run's value."""
    words = [dict(leaves(run.recipe.model_dump(mode="json"))) for run in runs]
    rows = [(key, [own.get(key, "–") for own in words]) for key in dict.fromkeys(key for own in words for key in own)]
    return [(key, [str(value) for value in values]) for key, values in rows if any(value != values[0] for value in values)]


def picture(image: Image.Image, longest: int) -> str:
    """The picture inside the page: a data URI, no larger than needed."""
    image = image.convert("RGB")
    image.thumbnail((longest, longest))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=88)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
