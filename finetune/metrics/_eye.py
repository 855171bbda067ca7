"""Networks that see: pictures and texts become rows of features. Each set of pictures is looked at once.

Shapes: N pictures or texts, D features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from finetune import device
from finetune.errors import FinetuneError
from finetune.families._source import OWN_ATTENTION, UNUSABLE

BATCH, SIDE = 16, 16


class Pixels:
    """Without a network: the picture's own colours, in SIDE × SIDE cells, between −1 and 1."""

    path = "pixels"

    def pictures(self, album: Sequence[Image.Image]) -> np.ndarray:
        """(N, D)."""
        cells = [album[i].convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX) for i in range(len(album))]
        return np.stack([np.asarray(cell, float).ravel() / 127.5 - 1 for cell in cells])

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        raise FinetuneError("pixels: they know no words; name a CLIP")


@contextmanager
def refusing(path: str, advice: str) -> Iterator[None]:
    """Inside, what transformers makes of files that it cannot use is a FinetuneError."""
    try:
        yield
    except UNUSABLE as e:
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise FinetuneError(f"{path}: cannot be used: {why}\n    {advice}") from None


def opened(kind, path: str, dtype: torch.dtype | str) -> torch.nn.Module:
    """The model of a local folder or a hub id, by the `kind` of transformers' AutoModel…, whole and in eval mode. Only
    safetensors are read, and no code that comes with them is run."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(path)
    parts = config, *(getattr(config, name, config) for name in config.sub_configs)
    if other := [part._attn_implementation for part in parts if part._attn_implementation not in OWN_ATTENTION]:
        raise ValueError(f"its config asks for the attention {other[0]!r}, which is code from elsewhere")
    if any(getattr(part, "quantization_config", None) is not None for part in parts):
        raise ValueError("its quantization_config chooses code from elsewhere; take the model that is not quantized")
    model, found = kind.from_pretrained(path, use_safetensors=True, dtype=dtype, output_loading_info=True)
    if missing := sorted(key for key in found["missing_keys"] if not key.startswith("pooler.")):     # is not looked at
        raise ValueError(f"{len(missing)} of its tensors are missing, for example {missing[0]}")
    return model.eval()


class Network:
    """A CLIP, or another transformer for pictures. Raises FinetuneError."""

    def __init__(self, path: str):
        import transformers

        self.path, self.seen = path, {}
        with refusing(path, "a metric looks with a local folder or a hub id of transformers, NAME:MODEL, or without a "
                            "network: NAME:pixels"):
            self.model = opened(transformers.AutoModel, path, torch.float32)
            self.processor = transformers.AutoImageProcessor.from_pretrained(path, backend="pil")
            self.words = transformers.AutoTokenizer.from_pretrained(path) if hasattr(self.model, "get_text_features") else None

    @torch.inference_mode()
    def pictures(self, album: Sequence[Image.Image]) -> np.ndarray:
        """(N, D) features: CLIP's in the space that it shares with text, of others the class token of the last layer."""
        if id(album) not in self.seen:
            self.model.to(device.best())
            rows = [self._batch([album[i] for i in range(start, min(start + BATCH, len(album)))])
                    for start in range(0, len(album), BATCH)]
            self.seen[id(album)] = album, torch.cat(rows).double().cpu().numpy()       # the album too: its id stays its own
        return self.seen[id(album)][1]

    def _batch(self, pictures: list[Image.Image]) -> torch.Tensor:
        pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"].to(self.model.device)
        if self.words is not None:
            return _projected(self.model.get_image_features(pixel_values=pixels))
        states = self.model(pixel_values=pixels).last_hidden_state
        if states.ndim != 3:
            raise FinetuneError(f"{self.path}: is no transformer with a class token, such as DINO")
        return states[:, 0]

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D) in the space of the pictures. Raises FinetuneError for what is too long, and for a network without words."""
        if self.words is None:
            raise FinetuneError(f"{self.path}: knows no words; name a CLIP")
        most = self.model.config.text_config.max_position_embeddings
        if long := [text for text in texts if len(self.words(text)["input_ids"]) > most]:
            raise FinetuneError(f"{self.path}: reads {most} tokens at the most; too long: {long[0]!r}")
        unique, which = np.unique(list(texts), return_inverse=True)
        tokens = self.words(unique.tolist(), padding=True, return_tensors="pt").to(self.model.device)
        return _projected(self.model.get_text_features(**tokens)).double().cpu().numpy()[which]


def _projected(found) -> torch.Tensor:
    return getattr(found, "pooler_output", found)       # transformers 5 wraps it
