"""Where a base comes from, and what kind it is: all of its files are read here, and nothing in them is run."""

import json
import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from finetune.errors import FinetuneError

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny"
# What the libraries raise for files that are not as they should be, and what a config may say of attention: all else is
# fetched.
UNUSABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ImportError,
            SafetensorError, StrictDataclassError)
OWN_ATTENTION = (None, "eager", "sdpa")


class Unreachable(FinetuneError):
    """A base that may be there, but not here and now."""


@dataclass(frozen=True)
class Changes:
    """What the words of a base want to be otherwise, see _altered.py."""

    parts: Mapping[str, str] = field(default_factory=dict)      # part -> the folder or file that it is taken from
    clip_skip: int = 1                                          # 1 is none, as web UIs count
    quantize: str | None = None                                 # nf4 or int8: all but the VAE
    prediction: str | None = None                               # in the words of diffusers, and
    zero_snr: bool | None = None                                # zero terminal SNR; None is what the base says


@dataclass(frozen=True)
class Source:
    """Where a base comes from: a diffusers folder or a hub id. All of a base's files are read through it.

    Components go by diffusers' names, such as `unet` or `text_encoder_2`, and so does the index."""

    path: str
    revision: str | None
    variant: str | None
    index: dict             # model_index.json
    notes = ()              # what is worth saying before a run: a single file has some
    changes = Changes()

    @property
    def name(self) -> str:
        """The hub id, or the folder's own name without the private path to it."""
        return Path(self.path).name if Path(self.path).is_dir() else self.path

    def has(self, component: str) -> bool:
        """Whether the base has this component; `[null, null]` is how diffusers writes that it has not."""
        entry = self.index.get(component)
        return isinstance(entry, list) and bool(entry[:1] != [None] and entry)

    def config(self, component: str) -> dict:
        return json_object(self.path, f"{component}/config.json", self.revision)

    def load(self, cls: type, component: str, dtype: torch.dtype) -> nn.Module:
        """A frozen part in eval mode. Raises FinetuneError when it is not there or cannot be read."""
        self.config(component)      # is looked through
        try:
            part, found = cls.from_pretrained(self.path, subfolder=component, revision=self.revision, use_safetensors=True,
                                              variant=self.variant or self._only_variant(component), dtype=dtype,
                                              output_loading_info=True)
        except UNUSABLE as e:
            raise FinetuneError(f"base.path: {self.path}: its {component} cannot be loaded\n    {str(e).strip()}") from None
        if missing := sorted(found["missing_keys"]):        # the libraries fill these with random numbers
            raise FinetuneError(f"base.path: {self.path}: its {component} lacks {len(missing)} tensors, for example "
                                f"{missing[0]}")
        if any(p.dtype != dtype for p in part.parameters()):       # transformers keeps the file's own dtype
            part.to(dtype)
        return part.requires_grad_(False).eval()

    def tokenizer(self, component: str):
        """FinetuneError when it is not there, or is not whole: without its files transformers makes an empty one."""
        import transformers

        try:
            kind = str((self.index.get(component) or ["", ""])[1])
            cls = transformers.T5Tokenizer if kind.startswith("T5") else transformers.CLIPTokenizer     # no class of a file's
            found = cls.from_pretrained(self.path, subfolder=component, revision=self.revision)
        except UNUSABLE as e:
            raise FinetuneError(f"base.path: {self.path}: its {component} cannot be loaded\n    {e}") from None
        encoder = component.replace("tokenizer", "text_encoder")
        wanted = self.config(encoder).get("vocab_size", 49408)      # CLIP's, where a config leaves it out
        if len(found) != wanted and not (kind.startswith("T5") and 0 <= wanted - len(found) < 128):     # T5 rounds up
            raise FinetuneError(f"base.path: {self.path}: its {component} has {len(found)} tokens, its {encoder} {wanted}")
        return found

    def scheduler(self, component: str = "scheduler"):
        """The sampler that the base is published with; its config says how the base was trained."""
        import diffusers

        try:
            name = self.index[component][1]
            if not name.endswith("Scheduler"):      # the file names a class: nothing but a scheduler is built from it
                raise ValueError(f"model_index.json: {name!r} is no scheduler")
            return getattr(diffusers, name).from_pretrained(self.path, subfolder=component, revision=self.revision)
        except UNUSABLE as e:
            raise FinetuneError(f"base.path: {self.path}: its {component} cannot be loaded\n    {e}") from None

    def _only_variant(self, component: str) -> str | None:
        """`fp16` for a folder that holds nothing but *.fp16.safetensors, which diffusers does not find by itself."""
        names = [p.name for p in Path(self.path, component).glob("*.safetensors")]
        return "fp16" if names and all(".fp16." in name for name in names) else None


def locate(path: str, revision: str | None = None, variant: str | None = None) -> Source:
    """The source behind `base.path`: `tiny`, a folder, a file or a hub id. Raises FinetuneError when there is none."""
    quiet()
    path = str(TINY) if path == "tiny" else str(own) if (own := Path(os.path.expanduser(path))).exists() else path
    if word := "revision" if revision and Path(path).exists() else "variant" if variant and Path(path).is_file() else None:
        raise FinetuneError(f"base.{word} (--{word}): {path} is here and has none to choose from; leave it out")
    if Path(path).is_file():
        from finetune.families._single import source

        return source(path)
    if Path(path).is_dir() and not Path(path, "model_index.json").is_file():
        raise FinetuneError(f"base.path: {path} is no diffusers folder: it has no model_index.json")
    return Source(path, revision, variant, json_object(path, "model_index.json", revision))


def json_object(path: str, file: str, revision: str | None) -> dict:
    """A JSON file of the source. Raises FinetuneError for one that is none, and for one that would have code fetched."""
    try:
        value = json.loads(_fetch(path, file, revision).read_text(encoding="utf-8"), object_hook=_without_code)
        if not isinstance(value, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as e:
        raise FinetuneError(f"base.path: {path}/{file} is not JSON, or not such: {e}") from None
    return value


def _without_code(fields: dict) -> dict:
    for key in ("attn_implementation", "_attn_implementation"):
        if fields.get(key) not in OWN_ATTENTION:
            raise ValueError(f"its {key} {fields[key]!r} is code from elsewhere, which transformers would fetch and run; "
                             "take it out")
    if fields.get("quantization_config") is not None:
        raise ValueError("its quantization_config chooses whose code unpacks the weights, and that would be fetched or "
                         "imported; take a base that is not quantized, and base.quantize for few bits")
    return fields


def quiet() -> None:
    """No progress bars for small files and no notes about things that are as they should be; errors are still raised."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)       # before it is imported: it misses GPU kernels aloud
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _fetch(path: str, file: str, revision: str | None) -> Path:
    """A small file of the source, from disk or from the hub."""
    if Path(path).is_dir():
        if not Path(path, file).is_file():
            raise FinetuneError(f"base.path: {path} has no {file}")
        return Path(path, file)
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HFValidationError

    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise FinetuneError(f"base.path: there is no folder {path}")
    # For this file and all that follow: what is in the cache is taken, and nobody is asked again and again for half a minute.
    constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE or not answers(constants.ENDPOINT)
    try:
        return Path(hf_hub_download(path, file, revision=revision))
    except (OSError, HFValidationError) as e:
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        reason = "offline, and not in the cache here" if constants.HF_HUB_OFFLINE else why
        raise Unreachable(f"base.path: {path} is neither `tiny`, nor a folder here, nor a hub model that can be reached\n"
                            f"    hub: {reason}") from None


@cache
def answers(endpoint: str) -> bool:
    """Whether somebody is there to be asked; behind a proxy it is taken for granted."""
    where = urlsplit(endpoint)
    if getproxies():
        return True
    try:
        socket.create_connection((where.hostname, where.port or {"http": 80}.get(where.scheme, 443)), timeout=5).close()
    except OSError:
        return False
    return True


def check_family(source: Source, wanted: str, known: list[str]) -> None:
    """Raise FinetuneError when the source is another family's."""
    found = kind_of(source)
    if found != wanted:
        advice = f"use family: {found}" if found in known else f"this version trains: {', '.join(known)}"
        raise FinetuneError(f"base.family: {wanted}, but {source.path} is {found}: {advice}")


def kind_of(source: Source) -> str:
    """The family of a source by its pipeline and its UNet's config, or in words what else it is."""
    name = str(source.index.get("_class_name", ""))
    if found := next((family for word, family in (("Diffusion3", "sd3"), ("Flux", "flux")) if word in name), None):
        return found
    if not name.startswith("StableDiffusion"):
        return name or "no pipeline"
    xl = "sdxl" if "XL" in name else None
    if "unet" not in source.index:
        return xl or name
    unet = source.config("unet")
    if name == "StableDiffusionUpscalePipeline":
        return "upscaler"
    channels, width = unet.get("in_channels", 4), unet.get("cross_attention_dim")
    if xl and (width == 1280 or source.index.get("text_encoder") == [None, None]):
        return "the refiner of SDXL, which only ends what its base began"
    if channels not in (4, 9) or unet.get("class_embed_type") or unet.get("num_class_embeds"):
        return f"a variant of Stable Diffusion with {channels} input channels (depth, upscaling, …)"
    # The width of the text tells the published ones apart; of smaller ones, that since SD 2 proj_in is linear.
    return xl or {"768": "sd1", "1024": "sd2"}.get(str(width)) or ("sd2" if unet.get("use_linear_projection") else "sd1")
