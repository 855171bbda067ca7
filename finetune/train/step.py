"""The one module that Accelerate wraps: a batch in, its loss out."""

from torch import Tensor, nn

from finetune.batch import Batch


class TrainStep(nn.Module):
    """Holds only the parts with trainable parameters; everything frozen stays outside of it."""

    def __init__(self, family, method, objective, seed: int):
        super().__init__()
        self.trained = nn.ModuleDict({part: family.parts[part] for part in method.trains} | objective.networks)
        self._call = lambda batch: objective(family, batch, seed)      # a closure, so that nothing frozen is registered

    def forward(self, batch: Batch) -> Tensor:
        """The loss ()."""
        return self._call(batch).loss
