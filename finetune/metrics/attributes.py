"""What a small classifier reads in the picture, against the words of the prompt: share that is right, of each attribute.

The classifier is one .safetensors file; its metadata holds `reader`, JSON: `{"size": 64, "strides": [2, 2, 1], "heads":
{"colour": ["red", "blue"]}}`. `scripts/reader_for_eval.py` writes the tiny base's."""

import json
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from finetune.artifact import read_tensors
from finetune.errors import FinetuneError
from finetune.header import read_header
from finetune.metrics.base import Measured, Painted, share

NEEDS, MODEL, BETTER = set(), None, "higher"


class Reader(nn.Module):
    """Convolutions of 3 × 3 with norms, the means and the maxima of what they find, and a linear head for each attribute."""

    def __init__(self, path: str):
        """Raises FinetuneError for a file that is no such thing."""
        super().__init__()
        try:
            facts, tensors = json.loads(read_header(path).metadata["reader"]), read_tensors(path)
            self.size, self.words, wide, layers = int(facts["size"]), dict(facts["heads"]), 3, []
            for number, stride in enumerate(facts["strides"]):
                out = len(tensors[f"body.{3 * number}.weight"])
                layers += [nn.Conv2d(wide, out, 3, int(stride), 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
                wide = out
            self.body = nn.Sequential(*layers)
            self.heads = nn.ModuleDict({head: nn.Linear(2 * wide, len(words)) for head, words in self.words.items()})
            self.load_state_dict(tensors)
        except (KeyError, ValueError, TypeError, RuntimeError) as e:
            raise FinetuneError(f"--metric attributes:{path}: is no classifier that this metric reads: "
                                f"{str(e).splitlines()[0]}") from None
        self.eval()

    @torch.inference_mode()
    def read(self, album: Sequence) -> list[dict[str, str]]:
        """Attribute → word, of each picture."""
        return [{head: self.words[head][int(scores.argmax())] for head, scores in self(album[i]).items()}
                for i in range(len(album))]

    def forward(self, picture) -> dict[str, torch.Tensor]:
        x = torch.from_numpy(np.array(picture.convert("RGB").resize((self.size,) * 2))).permute(2, 0, 1)[None].float() / 255
        h = self.body(x - 0.5)
        h = torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1)
        return {name: head(h)[0] for name, head in self.heads.items()}


eye = Reader        # what this metric looks with


def check(prompts: list[str], reader: Reader) -> None:
    """Raise FinetuneError for prompts that ask for nothing that it reads."""
    if not asked(prompts, reader):
        raise FinetuneError("--metric attributes: no prompt has exactly one of its words, such as "
                            f"{', '.join(str(words[0]) for words in reader.words.values())}")


def measure(painted: Painted, reader: Reader) -> dict[str, Measured]:
    read = reader.read(painted.pictures)
    return {f"{head}_right": share(np.array([float(seen[head] == word) if word else np.nan
                                             for seen, word in zip(read, words)]))
            for head, words in asked(painted.prompts, reader).items()}


def asked(prompts: list[str], reader: Reader) -> dict[str, list[str | None]]:
    """Attribute → the word that each prompt asks for; None, and the picture does not count, unless it has exactly one."""
    said, found = [set(re.findall(r"\w+", prompt.lower())) for prompt in prompts], {}
    for head, words in reader.words.items():
        fits = [[word for word in words if word.lower() in some] for some in said]
        found[head] = [some[0] if len(some) == 1 else None for some in fits]
    return {head: words for head, words in found.items() if any(words)}
