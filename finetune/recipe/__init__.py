"""From the words of a recipe to checked, frozen values. Needs no torch."""

from finetune.recipe.load import Loaded, load
from finetune.recipe.resolved import difference, dump, training_part
from finetune.recipe.schema import Recipe

__all__ = ["Loaded", "Recipe", "difference", "dump", "load", "training_part"]
