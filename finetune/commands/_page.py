"""The live page in Gradio: what it shows and does are the functions of `status`, `report`, `train`, `stop` and `sample`."""

import math
import re
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterable
from functools import wraps
from html import escape
from pathlib import Path

import gradio as gr
from PIL import Image

from finetune import device
from finetune.commands import status, stop
from finetune.errors import FinetuneError
from finetune.recipe import load, shipped
from finetune.runfolder import RunFolder
from finetune.train import adapters, ground, report, sampling
from finetune.train.jobs import jobs

SECONDS, TAIL = 2, 8000     # between two looks at the runs; bytes of a command's words that are shown
THEME = gr.themes.Base(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = (Path(__file__).resolve().parent.parent / "assets" / "page.css").read_text(encoding="utf-8")


def page() -> gr.Blocks:
    """All of it; `finetune ui` serves it."""
    started, base = Started(), Base()
    said = gr.Textbox(label="What was started here", lines=6, max_lines=16, visible=False, render=False)
    with gr.Blocks(title="finetune", analytics_enabled=False) as shown:
        gr.Markdown("# finetune")
        with gr.Tab("Runs"):
            runs_tab(shown, started, said)
        with gr.Tab("Try") as tab:
            try_tab(tab, base)
        with gr.Tab("Train"):
            train_tab(started)
        said.render()
    return shown


class Started:
    """The command that this page started last. It lives on when the page is closed."""

    def __init__(self):
        self.words, self.process, self.file = [], None, None

    def start(self, words: list[str], folder: str | None = None) -> None:
        self.words, self.file = words, tempfile.NamedTemporaryFile("ab")
        self.process = subprocess.Popen([sys.executable, "-m", "finetune", *words], cwd=folder, stdin=subprocess.DEVNULL,
                                        stdout=self.file, stderr=self.file, start_new_session=True)

    def said(self) -> str:
        """What it said so far, of its bars the last state, and how it ended."""
        if self.process is None:
            return ""
        with open(self.file.name, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            text = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", file.read().decode(errors="replace"))
        ended = "" if (code := self.process.poll()) is None else f"(ended with exit code {code})"
        lines = [" ".join(["$ finetune", *self.words]), *filter(str.strip, re.split(r"[\r\n]+", text)), ended]
        return "\n".join(line for line, after in zip(lines, [*lines[1:], ""]) if not ("%|" in line and "%|" in after))


class Base:
    """The base that is in memory: one at a time, kept until another is asked for."""

    def __init__(self):
        self.words, self.family = None, None

    def of(self, recipe):
        words = recipe.base, recipe.data.caption.long
        if self.words != words:
            self.words = self.family = None     # before the next one needs its memory
            family = ground.base(recipe)
            for part in family.parts.values():
                part.to(device.best())
            self.words, self.family = words, family
        return self.family


def told(handler):
    """The handler, with the user's mistakes shown as the command line says them."""
    @wraps(handler)
    def safe(*values):
        try:
            return handler(*values)
        except FinetuneError as e:
            words = escape(str(e)).replace("\n", "<br>")
            raise gr.Error(words, duration=None, title="That cannot be done", print_exception=False) from None
    return safe


def runs_tab(shown: gr.Blocks, started: Started, said: gr.Textbox) -> None:
    table = gr.HTML(apply_default_css=False)
    chosen = gr.Dropdown([], multiselect=True, label="Look at")
    with gr.Row():
        halt, go_on, whole = (gr.Button(name, min_width=90) for name in ("Stop", "Continue", "Report"))
    curves = gr.HTML(apply_default_css=False)
    step = gr.Slider(0, 1, step=1, label="Previews at step", visible=False)
    previews, written = gr.HTML(apply_default_css=False), gr.HTML(apply_default_css=False)
    seen = gr.State({})

    def look(*values):
        words = started.said()
        return [*refresh(*values), gr.update(value=words, visible=bool(words))]

    gr.on([shown.load, chosen.input, gr.Timer(SECONDS).tick], look, [chosen, step, seen],
          [table, chosen, curves, step, previews, seen, said], show_progress="hidden")
    step.input(lambda chosen, step: sheets(map(Path, chosen), step), [chosen, step], previews, show_progress="hidden")
    halt.click(told(end), chosen)
    go_on.click(told(lambda chosen: resume(started, one(chosen))), chosen)
    whole.click(told(whole_report), chosen, written)


def refresh(chosen: list[str], step: float, seen: dict) -> list:
    """What is new since the last look. A run that has begun since is looked at; who looks at the newest preview follows it."""
    rows = [status.row(folder) for folder in status.runs()]
    names, running = ([one["run"] for one in rows if state in one["state"]] for state in ("", "running"))
    begun = [run for run in running if run not in seen.get("running", [])]
    chosen = begun or [run for run in chosen if run in names] or ([] if seen else names[-1:])
    folders = [Path(run) for run in chosen]
    steps = sorted({step for folder in folders for step in report.previews(folder)})
    if steps and (step not in steps or [step] == seen.get("steps", [step])[-1:]):
        step = steps[-1]
    ends = {"minimum": steps[0], "maximum": steps[-1], "step": math.gcd(*(s - steps[0] for s in steps)), "value": step} \
        if len(steps) > 1 else {}
    marks = [(folder, step, len(report.previews(folder))) for folder in folders]
    now = {"table": scoped(report.template("runs.html").render(rows=rows, clock=status.clock)),
           "chosen": gr.update(choices=names, value=chosen),
           "curves": curves_of(folders), "step": gr.update(visible=bool(ends), **ends),
           "previews": seen["previews"] if marks == seen.get("marks") else sheets(folders, step)}
    return [*(new if new != seen.get(key) else gr.skip() for key, new in now.items()),
            now | {"running": running, "steps": steps, "marks": marks}]


def curves_of(folders: list[Path]) -> str:
    try:
        return scoped(report.page(folders, "summary", "differences", "curves")) if folders else ""
    except FinetuneError as e:
        return scoped(f'<p class="bad">{escape(str(e))}</p>')


def sheets(folders: Iterable[Path], step: float) -> str:
    """Of each run its last preview up to that step."""
    shown = []
    for folder in folders:
        if known := [known for known in report.previews(folder) if known <= step]:
            uri = report.picture(Image.open(report.previews(folder)[known[-1]]), report.WIDEST)
            shown.append(f'<div><h3>{escape(folder.name)}, step {known[-1]}</h3><img alt="preview" src="{uri}"></div>')
    return scoped(f'<div class="row">{"".join(shown)}</div>')


def scoped(text: str) -> str:
    """A piece of the report in the report's own clothes, which Gradio's page does not wear."""
    style = report.page([], "style").replace(":root", "&")
    return f'<style>.finetune.finetune {{{style}}}</style><div class="finetune">{text}</div>'


def one(chosen: list[str]) -> Path:
    if len(chosen) != 1:
        raise FinetuneError(f"{len(chosen)} runs are chosen: choose the one that is meant")
    return Path(chosen[0])


def end(chosen: list[str]) -> None:
    stop.run(Namespace(run=one(chosen), wait=60))


def resume(started: Started, folder: Path) -> None:
    """The same command again."""
    last = RunFolder(folder, folder.name).last_owner()
    if not last or not last["words"]:
        raise FinetuneError(f"{folder}: how it was started is not known; under Train, start its recipe with this run folder")
    started.start(["train", *last["words"]], last["working_folder"])


def whole_report(chosen: list[str]) -> str:
    if not chosen:
        raise FinetuneError("no run is chosen")
    text = report.page([Path(run) for run in chosen])
    return f'<iframe class="report" sandbox="allow-scripts" srcdoc="{escape(text)}"></iframe>'


def try_tab(tab: gr.Tab, base: Base) -> None:
    with gr.Row():
        first = gr.Dropdown([], label="Adapter", info="of a run, or a path", allow_custom_value=True, min_width=300)
        strength = gr.Slider(-1, 2, 1, step=0.05, label="Strength")
    with gr.Row():
        second = gr.Dropdown([], label="Another", info="to compare, or none", allow_custom_value=True, min_width=300)
        other = gr.Slider(-1, 2, 1, step=0.05, label="Strength of the other")
    prompt, negative = gr.Textbox(label="Prompt"), gr.Textbox(label="Negative prompt")
    with gr.Row():
        recipe = gr.Dropdown([], label="Base", info="that of a run or a recipe", allow_custom_value=True, min_width=300)
        seed = gr.Slider(0, 9999, 0, step=1, label="Seed")
    with gr.Row():
        steps = gr.Slider(1, 100, 25, step=1, label="Steps")
        guidance = gr.Slider(0, 20, 5, step=0.5, label="Guidance")
    go = gr.Button("Sample", variant="primary")
    with gr.Row():
        shown = [gr.Image(visible=False, format="png", interactive=False, buttons=["download", "fullscreen"],
                          elem_classes="sampled") for _ in range(3)]

    tab.select(choices, None, [first, second, recipe], show_progress="hidden")
    first.input(run_of, first, recipe, show_progress="hidden")
    gr.on([go.click, prompt.submit], told(lambda *values: paint(base, *values)),
          [recipe, first, second, strength, other, prompt, negative, seed, steps, guidance], shown, concurrency_limit=1)


def choices() -> list:
    runs = status.runs()
    files = ["", *(str(file) for run in runs for file in sorted((run / "adapter").rglob("*.safetensors")))]
    return [gr.update(choices=files), gr.update(choices=files), gr.update(choices=[*map(str, runs), *recipes()])]


def recipes() -> list[str]:
    """Those of the working folder, and those that come with the toolkit."""
    own = sorted({*Path().glob("*.yaml"), *Path("recipes").glob("*.yaml")})
    known = {path.resolve() for path in own}
    return [*map(str, own), *(str(path) for path in shipped.paths() if path.resolve() not in known)]


def run_of(adapter: str):
    """The run that an adapter lies in, for its base."""
    found = [str(folder) for folder in Path(adapter).parents if (folder / "resolved.yaml").is_file()]
    return found[0] if found else gr.skip()


def paint(base: Base, recipe: str, first: str, second: str, strength: float, other: float, *words) -> list:
    """The base, and each adapter on it, with the same seed."""
    if not recipe:
        raise FinetuneError("no base is chosen: choose a run or a recipe, whose base is taken")
    wanted = jobs([("", "", dict(zip(("prompt", "negative", "seed", "steps", "guidance"), words)))], {})
    path, shown = Path(recipe), []
    family = base.of(load(path / "resolved.yaml" if path.is_dir() else path).recipe)
    for name, files in (("Base", []), (f"Adapter × {strength:g}", [f"{first}:{strength}"] if first else None),
                        (f"Another × {other:g}", [f"{second}:{other}"] if second else None)):
        if files is None:
            shown.append(gr.update(visible=False))
            continue
        with adapters.on(family, adapters.load([adapters.named(file) for file in files], family)):
            [picture] = sampling.generate(family.pipeline(), sampling.settle(family, wanted))
        shown.append(gr.update(value=picture, visible=True, label=name))
    return shown


def train_tab(started: Started) -> None:
    recipe = gr.Dropdown(recipes(), value=None, label="Recipe", allow_custom_value=True)
    text = gr.Code(language="yaml", label="Recipe", interactive=False, visible=False)
    settings = gr.Textbox(label="Settings", info="a field in each line", placeholder="train.learning_rate=3e-4", lines=2)
    folder = gr.Textbox(label="Run folder", placeholder="runs/NAME of the recipe")
    fresh = gr.Checkbox(label="Move a run that is there aside, and start anew")
    with gr.Row():
        check, start = gr.Button("Check the data"), gr.Button("Start or continue", variant="primary")

    def order(command: str, recipe: str | None, settings: str, folder: str = "", fresh: bool = False) -> None:
        if not recipe:
            raise FinetuneError("no recipe is chosen")
        changed = [word for line in settings.splitlines() if line.strip() for word in ("--set", line.strip())]
        started.start([command, recipe, *changed, *(["--run", folder] if folder else []), *(["--fresh"] if fresh else [])])

    recipe.input(told(lambda name: gr.update(value=load(name).text, visible=True)), recipe, text)
    check.click(told(lambda *values: order("lint", *values)), [recipe, settings])
    start.click(told(lambda *values: order("train", *values)), [recipe, settings, folder, fresh])
