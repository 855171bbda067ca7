"""What is wrong or odd about the data of a recipe, found before a second is spent on training.

What training refuses is looked for by the very functions that training calls; the model's weights are not needed."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from finetune import registry, tokens
from finetune.data import encode
from finetune.data.captions import Captions
from finetune.data.duplicates import copies
from finetune.data.index import Index, concatenated
from finetune.data.loader import Stream
from finetune.data.split import split
from finetune.data.tables import Note
from finetune.errors import FinetuneError
from finetune.families._source import Unreachable
from finetune.recipe import Recipe
from finetune.train import ground
from finetune.train.learned import check_said
from finetune.train.learned import words as learned_words
from finetune.train.sampling import followed, previews

OFTEN = 500         # a picture that is seen so often is known by heart
CUT_AWAY = 1 / 3    # of a picture: what a square takes from one of 3 : 2

Say = Callable[[str], None]


@dataclass
class Report:
    """What was found. Notes that are fatal are what training refuses."""

    pictures: dict[str, int] = field(default_factory=dict)      # role -> how many
    buckets: list[dict] = field(default_factory=list)
    plan: dict = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    undone: list[str] = field(default_factory=list)             # checks that could not be made, and why

    def tried(self, kind: str, call: Callable, *args):
        """What the call gives; None and a note when it raises FinetuneError, which names the field itself."""
        try:
            return call(*args)
        except Unreachable as e:
            self.undone.append(f"{kind}: {e}")
        except FinetuneError as e:
            name, _, text = str(e).partition(": ")
            self.notes.append(Note(kind, name, text))

    @property
    def code(self) -> int:
        """0 nothing, 1 only warnings, 2 it cannot be trained."""
        return 2 if any(note.fatal for note in self.notes) else 1 if self.notes else 0


def lint(recipe: Recipe, say: Say) -> Report:
    """All that can be found out about the data of a recipe, as one process would train it."""
    report = Report()
    indexes: dict[str, Index] = {}
    for role in ("learn", "validation", "class"):
        index = report.tried("source", ground.found, recipe, role, say, False)
        if index is not None:
            report.notes += [replace(note, fatal=ground.fatal(note, recipe)) for note in index.notes]
            indexes[role] = index
    wanted = recipe.data.validation
    if "learn" in indexes and wanted and not wanted.images:
        sides = report.tried("validation", split, indexes["learn"], wanted.fraction, wanted.files, recipe.train.seed,
                             ground.reading(recipe))
        indexes |= dict(zip(("learn", "validation"), sides or ()))
    report.pictures = {role: len(index) for role, index in indexes.items()}
    indexes = {role: index for role, index in indexes.items() if len(index)}

    family = report.tried("base", registry.find("families", recipe.base.family).outline, recipe.base.path,
                          recipe.base.revision, recipe.base.variant, ground.changes(recipe))
    if family:
        report.tried("size", ground.check_step, recipe, family.step)
        report.tried("base", ground.shown, recipe, family)
    size = recipe.train.batch_size * recipe.train.gradient_accumulation
    learned = report.tried("token", learned_words, recipe, indexes["learn"]) if "learn" in indexes else None
    if family and learned and learned.tokens:
        report.tried("token", tokens.extend, family, {name: {"text": torch.empty(token.vectors, 0)}
                                                      for name, token in learned.tokens.items()}, "method.tokens: ")
    streams = {role: report.tried("size", ground.stream, recipe, family.stride if family else 8, size, index, role,
                                  learned.stands if learned else {}) for role, index in indexes.items()}
    if indexes:
        report.notes += check_copies(indexes, ground.reading(recipe))
    if None not in streams.values():
        for stream in streams.values():
            report.notes += check_sizes(stream)
            report.notes += encode.check_captions(stream.index, stream.captions)
        if learn := streams.get("learn"):
            report.buckets, report.plan = buckets(learn), plan(learn, recipe)
            report.notes += check_times(report.plan) + (check_words(learn) if recipe.objective.kind == "denoise" else [])
        if family:
            if family.learned and "learn" in streams:
                report.tried("token", check_said, learned, streams["learn"], recipe.train.max_steps, family)
            for stream in streams.values():
                report.notes += check_length(stream, recipe, family)
            for job in previews(recipe) if recipe.preview.conditions else []:
                report.tried("source", followed, job)
            prompts = [("data.prior.prompt", recipe.data.prior.prompt)] if recipe.data.prior else []
            for key, prompt in prompts + [("preview.prompts", prompt) for prompt in recipe.preview.prompts]:
                report.tried("long", ground.check_prompt, key, prompt, family)
    report.notes = list(dict.fromkeys(report.notes))        # several roles may meet one mistake
    return report


def check_copies(indexes: dict[str, Index], reading) -> list[Note]:
    """Pictures that show the same: twice among those that are learned, or on two sides."""
    whole, roles = concatenated(list(indexes.values())), [role for role, index in indexes.items() for _ in range(len(index))]
    notes = []
    for group in copies(whole, reading):
        first = group[0]
        for i in group[1:]:
            same = "is" if (whole.digest[i] == whole.digest[first]).all() else "shows"
            side = {"validation": " and is held out", "class": " and is of the class"}.get(roles[i], "")
            text = f"{same} the same as {whole.name(first)}{side if roles[i] != roles[first] else ''}"
            notes.append(Note("copy", whole.name(i), text, (roles[first], roles[i]) == ("learn", "validation")))
    return notes


def check_sizes(stream: Stream) -> list[Note]:
    """Pictures that are smaller than what they are fitted to, or of another shape; the worst first."""
    index, (height, width) = stream.index, stream.sizes.T
    notes = encode.check_pictures(index, stream.sizes)
    factor = np.maximum(height / index.height, width / index.width)
    with np.errstate(divide="ignore"):
        lost = 1 - height * width / (index.height * index.width * factor ** 2)
    for i in np.argsort(-factor, kind="stable")[:(factor > 1).sum()]:
        notes.append(Note("small", index.name(i), f"{index.width[i]} × {index.height[i]} is enlarged {factor[i]:.2f} times "
                          f"to {width[i]} × {height[i]}", False))
    for i in np.argsort(-lost, kind="stable")[:(lost > CUT_AWAY).sum()]:
        notes.append(Note("shape", index.name(i), f"{index.width[i]} × {index.height[i]} loses {lost[i]:.0%} when it is cut "
                          f"to {width[i]} × {height[i]}", False))
    return notes


def check_words(stream: Stream) -> list[Note]:
    """Captions that say nothing, or the same of many pictures."""
    index, plain, columns = stream.index, undrawn(stream.captions), stream.captions.columns()
    notes, first, count = [], {}, Counter()
    for i in range(len(index)):
        own = index.columns(i)
        if "" in (plain.every(own) or ()):
            notes.append(Note("caption", index.name(i), "its caption is empty", False))
        if said := tuple(own[name] for name in columns if name in own):
            first.setdefault(said, i)
            count[said] += 1
    for said, times in count.most_common():
        if times > max(2, math.sqrt(len(index))):
            text = f"{times} pictures have its caption, {', '.join(said)!r}"
            notes.append(Note("caption", index.name(first[said]), text, False))
    return notes


def check_times(plan: dict) -> list[Note]:
    """Sources whose pictures are seen too often, or not all of them."""
    notes = []
    for path, times in plan["seen"]:
        if times < 1 or times > OFTEN:
            advice = "some of them never" if times < 1 else "they will be known by heart"
            text = f"its pictures are seen {times:.3g} times in {plan['steps']} steps: {advice}"
            notes.append(Note("seen", path, text, False))
    return notes


def check_length(stream: Stream, recipe: Recipe, family) -> list[Note]:
    """Captions that are longer than the text encoder takes; warnings when the recipe orders them to be cut."""
    cut = recipe.data.caption.long == "truncate"
    family.long = "error" if cut else recipe.data.caption.long
    if stream.captions.finite:
        found = encode.every_caption([(stream.index, stream.captions)])
        notes = [note for caption, name in found.items() if len(caption) <= encode.MAX_CHARACTERS
                 for note in encode.check_length(caption, name, family.cut_text)]
    elif encode.check_captions(stream.index, stream.captions):
        return []           # nothing can be drawn
    else:
        epoch = stream.order.stream.startswith("validation")
        notes = encode.check_drawn(stream, stream.order.steps if epoch else recipe.train.max_steps, family.cut_text)
    text = "its caption is longer than the text encoder takes, and is cut"
    return [replace(note, text=text, fatal=False) for note in notes] if cut else notes


def undrawn(captions: Captions) -> Captions:
    """The captions without what is drawn, but for wildcards."""
    tags = captions.tags and captions.tags.model_copy(update={"shuffle": False, "dropout": 0.0})
    return replace(captions, dropout=0.0, tags=tags)


def buckets(stream: Stream) -> list[dict]:
    """Of each size: its pictures, the steps that they take, and how many are in the last one."""
    sizes, counts = np.unique(stream.sizes, axis=0, return_counts=True)
    size = stream.order.size
    return [{"width": width, "height": height, "pictures": count, "steps": -(-slots // size), "last": (slots - 1) % size + 1}
            for (height, width), count, slots in zip(sizes.tolist(), counts.tolist(), stream.order.counts.tolist())]


def plan(stream: Stream, recipe: Recipe) -> dict:
    steps, epoch = recipe.train.max_steps, stream.order.steps
    found = {"steps": steps, "size": stream.order.size, "epoch": epoch,
             "seen": [(source.path, steps / epoch * source.repeats) for source in recipe.data.images]}
    captions = undrawn(stream.captions)
    if captions.trigger and captions.finite:
        without = replace(captions, trigger=None)
        rows = [stream.index.columns(i) for i in range(len(stream.index))]
        found["trigger"] = sum(captions.every(own) == without.every(own) != [] for own in rows)
    return found
