"""Metrics of previews: what `finetune eval` measures, on the way."""

from collections.abc import Sequence
from statistics import fmean

from PIL import Image

from finetune.data.index import Index
from finetune.errors import FinetuneError
from finetune.metrics._intervals import facts
from finetune.metrics.base import Album, Painted
from finetune.recipe import Recipe
from finetune.train import evaluate
from finetune.train.sampling import previews


class Judge:
    """The metrics that a recipe names, each with the network that it looks with."""

    def __init__(self, recipe: Recipe, index: Index):
        """`index` holds the training pictures. Raises FinetuneError for a metric that is unknown or cannot measure previews."""
        self.prompts = [job.prompt for job in previews(recipe)]
        given = {"training", "seeds"} if len(recipe.preview.seeds) > 1 else {"training"}
        self.metrics = evaluate.metrics(recipe.preview.metrics, given, "preview.metrics: ")
        if [one for one in self.metrics if one.word == recipe.train.keep_best and not one.module.BETTER]:
            raise FinetuneError(f"train.keep_best: {recipe.train.keep_best} says not what is better; name another metric")
        self.eyes = evaluate.eyes(self.metrics, self.prompts)
        self.training = Album([index.name(i) for i in range(len(index))], index.read).cut((recipe.data.resolution,) * 2)

    def of(self, pictures: Sequence[Image.Image]) -> dict[str, float]:
        """Each number, and under its own name what a metric says in all: the mean of its numbers."""
        found = {}
        for metric in self.metrics:
            eye = self.eyes[metric.model]
            values = {name: facts(one)["value"] for name, one in metric.module.measure(Painted(self.prompts, pictures, self.training), eye).items()}
            getattr(eye, "seen", {}).pop(id(pictures), None)        # they are not looked at again
            found |= values | {metric.word: fmean(values.values())}
        return found
