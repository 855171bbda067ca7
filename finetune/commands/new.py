"""Look at a folder of pictures and write a short recipe for it, with reasons."""

import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from finetune import registry
from finetune.commands import lint
from finetune.commands.plan import size
from finetune.disk import write_text, writing
from finetune.errors import FinetuneError, nearest


@dataclass(frozen=True)
class Known:
    """A base that has a short name."""

    family: str
    path: str
    resolution: int     # pixels
    rate: float         # learning rate of a LoRA
    gigabytes: float    # that one picture of a batch takes beside the weights, with gradient checkpointing: a rule of thumb
    weights: float      # gigabytes of its weights in bfloat16


BASES = {
    "tiny": Known("sd1", "tiny", 64, 2e-3, 0.02, 0.1),
    "sd15": Known("sd1", "stable-diffusion-v1-5/stable-diffusion-v1-5", 512, 1e-4, 0.9, 2.2),
    "sd21": Known("sd2", "stabilityai/stable-diffusion-2-1", 768, 1e-4, 1.8, 2.6),
    "sdxl": Known("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", 1024, 1e-4, 2.2, 5.5),
    "sd3": Known("sd3", "stabilityai/stable-diffusion-3.5-medium", 1024, 1e-4, 3.0, 16.3)     # 9.5 of T5,
}
SEEN = 100              # times that a picture is seen in a run, as long as MOST allows it
LEAST, MOST = 300, 3000     # steps
LARGEST = 8             # batch


def add_arguments(parser) -> None:
    parser.add_argument("pictures", type=Path, help="a folder of pictures, with or without captions")
    parser.add_argument("--base", default="sd15", help=f"{', '.join(BASES)}, or a diffusers folder")
    parser.add_argument("--goal", choices=("style", "subject", "concept"), default="style",
                        help="a way of drawing; one person, animal or thing; a new word for what the base can draw already")
    parser.add_argument("--word", help="the word that will call it; made from the folder's name if left out")
    parser.add_argument("--class", dest="kind", metavar="WORDS",
                        help="of a subject or concept: what kind of thing it is, as in dog")
    parser.add_argument("--vram", metavar="8GB", help="memory of the GPU")
    parser.add_argument("--out", type=Path, metavar="FILE", help="NAME-GOAL.yaml of the folder if left out")


def run(args) -> int:
    """Write the recipe and print what lint says of it; the exit code is lint's, but for warnings."""
    from finetune.recipe import load

    name = re.sub(r"[^a-z0-9]+", "-", args.pictures.resolve().name.lower()).strip("-") or "mine"
    out = args.out or Path(f"{name}-{args.goal}.yaml")
    if out.exists():
        raise FinetuneError(f"{out} is there already; --out FILE writes another")
    say = lambda line: print(line, file=sys.stderr)     # noqa: E731
    base, index = known(args.base), look(args.pictures, say)
    with writing(str(out)):
        write_text(out, text(args, name, base, index, out))
    from finetune.train.lint import lint as look_closer

    report = look_closer(load(out, []).recipe, say)
    shown = shlex.quote(str(out))
    print(f"{lint.table(report)}\n\n{out} is written; read it, change it, and then\n"
          f"    finetune plan {shown}      # the memory it takes\n    accelerate launch -m finetune train {shown}")
    return 2 if report.code == 2 else 0


def look(pictures: Path, say):
    """The index of the folder. Raises FinetuneError when it holds nothing to learn from."""
    from finetune.data.index import build
    from finetune.data.pictures import Reading
    from finetune.recipe.data import Images

    index = build([Images(path=str(pictures))], Reading(), None, say, False, "pictures")
    if not len(index):
        raise FinetuneError("\n    ".join([f"{pictures}: there is no picture that can be read",
                                           *(f"{note.name}: {note.text}" for note in index.notes[:5])]))
    return index


def known(base: str) -> Known:
    """The base of that name, or what a folder says it is. Raises FinetuneError for neither."""
    if base in BASES:
        registry.check("families", BASES[base].family)
        return BASES[base]
    if not Path(base).exists():
        raise FinetuneError(f"--base {base}: is neither a folder nor one of {', '.join(BASES)}{nearest(base, BASES)}")
    problems = []
    for family in registry.names("families"):
        try:
            found = registry.find("families", family).outline(base)
        except FinetuneError as e:
            problems.append(f"{family}: {e}")
            continue
        like = next((known for known in BASES.values() if known.family == family and known.path != "tiny"), None)
        if not like:
            families = ", ".join(sorted({known.family for known in BASES.values()}))
            raise FinetuneError(f"--base {base}: is of the family {family}; `new` writes recipes for {families}")
        own = found.source.config(found.spec.components["denoiser"]).get("sample_size")
        side = own * found.stride if isinstance(own, int) else like.resolution
        return Known(family, base, side, like.rate, like.gigabytes * side ** 2 / like.resolution ** 2, like.weights)
    raise FinetuneError("\n    ".join([f"--base {base}: is of no family that is known here", *problems]))


def text(args, name: str, base: Known, index, out: Path) -> str:
    quote = lambda value: json.dumps(value, ensure_ascii=False)     # noqa: E731   JSON's strings are YAML's
    count, goal, tiny = len(index), args.goal, base.path == "tiny"
    columns = set.intersection(*(set(index.columns(i)) for i in range(min(count, 1000))))
    captioned = next((f"{{{name}}}" for name in ("text", "synthetic") if name in columns), "")
    kind = args.kind or "thing"
    word = args.word or {"style": f"{name.removesuffix('style').strip('-') or 'my'} style", "subject": f"zwx {kind}",
                         "concept": f"my-{name}"}[goal]
    batch, checkpointing = fitting(base, size(args.vram) / 2**30 if args.vram else 12)
    accumulation = max(1, round((4 if goal == "style" else 2) / batch))
    steps = min(MOST, max(LEAST, -(-count * SEEN // (batch * accumulation) // 50) * 50))
    caption = f"{captioned}, in {word}".removeprefix(", ") if goal == "style" else captioned or f"a photo of {word}"
    trigger = f", trigger: {quote(word)}" if captioned and goal != "style" else ""
    shapes = buckets(index, base.resolution)
    lines = [f"# accelerate launch -m finetune train {shlex.quote(str(out))}",
             f"# {goal.capitalize()} from {count:,} picture{'s' * (count > 1)}, by `finetune new`. Change what you like.",
             f"base: {{family: {base.family}, path: {quote(base.path)}" + ("}" if tiny else ", dtype: bfloat16}"),
             "data:",
             f"  images: {quote(str(args.pictures))}",
             f"  resolution: {base.resolution}" + "      # what the base was made for"]
    if shapes:
        lines.append(f"  buckets: {{step: {shapes}}}      # the pictures have different shapes: nothing has to be cut to a "
                     "square")
    lines.append(f"  caption: {{template: {quote(caption)}{trigger}, dropout: 0.1}}"
                 + ("" if captioned else "      # no captions were found: all pictures get this one"))
    if goal == "subject":
        kept = min(200, max(24 if tiny else 50, 10 * count))
        lines.append(f"  prior: {{prompt: {quote(f'a photo of a {kind}')}, count: {kept}}}      "
                     "# made by the base, so that others of the kind stay what they were")
    if goal == "concept":
        lines.append(f"method: {{kind: embedding, tokens: {{{quote(word)}: {{init: {quote(kind)}, vectors: 4}}}}}}")
    else:
        rank, targets = (8, "[all, conv]") if tiny else (16, "[all]")
        lines.append(f"method: {{kind: lora, rank: {rank}, alpha: {rank}, targets: {targets}}}")
    if not tiny:
        objective = "timesteps: logit_normal" if base.family == "sd3" else "weighting: {kind: min_snr, gamma: 5}"
        lines.append(f"objective: {{{objective}}}")
    seen = steps * batch * accumulation / count
    lines += ["train:", f"  max_steps: {steps}      # each picture is seen about {seen:.0f} times",
              f"  batch_size: {batch}", *([f"  gradient_accumulation: {accumulation}"] if accumulation > 1 else []),
              f"  learning_rate: {5e-3 if goal == 'concept' else base.rate:g}", "  schedule: cosine",
              f"  warmup_steps: {min(50, steps // 10)}"]
    if not tiny:
        lines += ["  mixed_precision: bf16"]
    if checkpointing:
        lines.append("  gradient_checkpointing: true      # half of the memory for a third more time")
    prompt = {"style": f"a lighthouse by the sea, in {word}"}.get(goal, f"a photo of {word} on a beach")
    lines += ["preview:", f"  prompts: [{quote(prompt)}]", "  seeds: [1, 2]",
              f"every: {{log: 10, preview: {steps // 4}, checkpoint: {steps // 4}}}"]
    return "\n".join(lines) + "\n"


def fitting(base: Known, vram: float) -> tuple[int, bool]:
    """Batch size, and whether activations have to be computed twice."""
    if base.path == "tiny":
        return LARGEST, False
    room = vram - base.weights - 1
    if room >= 4 * 3 * base.gigabytes:
        return 4, False
    return max(1, min(4, int(room / base.gigabytes))), True


def buckets(index, resolution: int) -> int | None:
    """The step of the buckets when a tenth of the pictures is far from square."""
    long = sum(max(w, h) > 1.15 * min(w, h) for w, h in zip(index.width.tolist(), index.height.tolist()))
    return min(64, resolution // 4) if long > len(index) / 10 else None
