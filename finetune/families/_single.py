"""A base, or a part of one, from a single file in the original naming: offline, tensor by tensor."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from finetune.artifact import published
from finetune.errors import FinetuneError
from finetune.families import _original
from finetune.families._identify import LAYOUTS, Known, Place, identify
from finetune.families._source import Changes, Source
from finetune.header import Header, read_header

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

ASSETS = Path(__file__).resolve().parent.parent / "assets"
ENDS = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class SingleFile:
    """Where a base comes from, as `Source` is: a file, the config of what it was recognised as, and CLIP's vocabulary."""

    path: str
    known: Known
    configs: dict[str, dict]        # model_index, and that of every component
    revision: None = None
    variant: None = None
    changes = Changes()

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def notes(self) -> tuple[str, ...]:
        return self.known.notes

    @cached_property
    def index(self) -> dict:
        """model_index.json, without what the pipeline can do without and this file does not have: T5, or its vocabulary."""
        absent = {c: [None, None] for c in ("text_encoder_3", "tokenizer_3")
                  if c in self.configs["model_index"]
                  and ("text_encoder_3" not in self.known.places or "tokenizer_3" not in self.configs)}
        return self.configs["model_index"] | absent

    def has(self, component: str) -> bool:
        absent = component in LAYOUTS[self.known.family] and component not in self.known.places
        return not absent and bool((self.index.get(component) or [None])[0])

    def config(self, component: str) -> dict:
        if component not in self.configs:
            raise FinetuneError(f"base.path: {self.path}: a model of the kind {self.known.name} has no {component}")
        return self.configs[component]

    def load(self, cls: type, component: str, dtype: torch.dtype) -> nn.Module:
        """A frozen part in eval mode. Raises FinetuneError when it is not in the file or does not fit the config."""
        try:
            if component not in self.known.places:
                raise FinetuneError(f"it holds no {component}")
            return load(self.path, self.known.places[component], cls, self.config(component), dtype)
        except FinetuneError as e:
            raise FinetuneError(f"base.path: {self.path}: {e}") from None

    def tokenizer(self, component: str) -> CLIPTokenizer:
        if component not in self.configs:
            raise FinetuneError(f"base.path: {self.path}: the vocabulary of its {component} (T5) is not in such a file; "
                                "train without T5, or from a diffusers folder")
        return clip_tokenizer(self.configs[component])

    def scheduler(self):
        """The sampler that models of this kind are published with, as the file says its noising is."""
        import diffusers

        config = self.config("scheduler")
        return getattr(diffusers, config["_class_name"]).from_config(config)


def source(path: str) -> SingleFile:
    """The base in a file. Raises FinetuneError for what is none: what it is, and what to do."""
    try:
        header = read_header(path)
        known = identify(header)
        if known.family is None:
            words = [component.replace("_encoder", "") for component in known.places]
            raise FinetuneError(f"it is no base, but the {', '.join(known.places)} of one: give it beside a base, as "
                                + ", ".join(f"base.{word} (--{word.replace('_', '-')})" for word in words))
        if known.name == "sd21-base" and known.prediction is None:      # no inpainting model predicts v
            known = replace(known, **_measured(path, known))
    except FinetuneError as e:
        raise FinetuneError(str(e) if str(e).startswith(str(path)) else f"base.path: {path}: {e}") from None
    return SingleFile(str(path), known, configs(known))


def configs(known: Known) -> dict[str, dict]:
    """What is shipped for a model of this kind, with the noising that its file tells of."""
    found = json.loads((ASSETS / "configs" / f"{known.name}.json").read_text(encoding="utf-8"))
    found["scheduler"] = noised(found["scheduler"], known.prediction, known.zero_snr or None)
    found["model_index"]["scheduler"] = ["diffusers", found["scheduler"]["_class_name"]]
    return found


def noised(scheduler: dict, prediction: str | None, zero_snr: bool | None) -> dict:
    """A scheduler's config with another noising; None is its own."""
    said = {"prediction_type": prediction} if prediction else {}
    said |= {} if zero_snr is None else {"rescale_betas_zero_snr": zero_snr}
    if zero_snr:        # PNDM knows none
        pndm = scheduler["_class_name"] == "PNDMScheduler"
        said |= {"timestep_spacing": "trailing"} | ({"_class_name": "DDIMScheduler"} if pndm else {})
    return scheduler | said


def _measured(path: str, known: Known) -> dict:
    """Base and 768-v of SD 2 have the same keys and shapes. The biases of the last norm spread further in those that predict
    v: the threshold is the one that ComfyUI goes by."""
    name = known.places["unet"][1] + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    try:
        with safe_open(path, "pt") as file:
            spread = file.get_tensor(name).float().std(correction=0).item()
    except SafetensorError:
        raise FinetuneError(f"it lacks {name}: it is cut or no whole Stable Diffusion 2") from None
    v = spread > 0.09
    return {"name": "sd21" if v else "sd21-base", "prediction": "v_prediction" if v else "epsilon",
            "notes": (*known.notes, "the file does not say what it predicts; "
                      f"{'v' if v else 'the noise'}, by the spread of a norm")}


def load(path: str, place: Place, cls: type, config: dict, dtype: torch.dtype) -> nn.Module:
    """One frozen part of a file, in eval mode. Raises FinetuneError when its tensors are not those of the config."""
    part = empty(cls, config)
    table, shapes = table_of(path, place, part)
    try:
        with safe_open(path, "pt") as file:
            tensors = dict(_original.read(lambda name: file.get_tensor(place[1] + name).to(dtype), table, shapes))
    except SafetensorError as e:
        raise FinetuneError(f"cannot be read: {e}") from None
    part.load_state_dict({name: tensors[published(name)].to(dtype) for name in part.state_dict()}, assign=True)
    if hasattr(part, "tie_weights"):
        part.tie_weights()
    return part.requires_grad_(False).eval()


def table_of(path: str, place: Place, part: nn.Module) -> tuple[list[_original.Row], dict[str, tuple[int, ...]]]:
    """(rows of the file's tensors, shapes of ours). Raises FinetuneError when its tensors are not those of the part."""
    shapes = {published(name): tuple(t.shape) for name, t in part.state_dict().items()}
    table = _original.rows(place[0], shapes)
    check(read_header(path), place, table, shapes)
    return table, shapes


def each(source: SingleFile, component: str) -> dict[str, Callable[[], Tensor]]:
    """{name of ours: what reads it} for the tensors of a part, each from a mapping of its own, so that none stays in memory.
    Raises FinetuneError when the part is not in the file or is of another model."""
    import diffusers
    import transformers

    if component not in source.known.places:
        raise FinetuneError(f"{source.path}: holds no {component}, but {', '.join(source.known.places)}")
    library, cls = source.index[component]
    place = source.known.places[component]
    table, shapes = table_of(source.path, place, empty(getattr({"diffusers": diffusers}.get(library, transformers), cls),
                                                       source.config(component)))

    def read(row: _original.Row, name: str) -> Tensor:
        with safe_open(source.path, "pt") as file:
            return dict(_original.read(lambda theirs: file.get_tensor(place[1] + theirs), [row], shapes))[name]

    return {name: partial(read, row, name) for row in table for name in row.ours}


def empty(cls: type, config: dict) -> nn.Module:
    """The part without memory for its weights."""
    from accelerate import init_empty_weights

    with ExitStack() as stack:
        if hasattr(cls, "from_config"):     # diffusers: every buffer is in the state dict
            stack.enter_context(torch.device("meta"))
            return cls.from_config(config)
        stack.enter_context(init_empty_weights(include_buffers=False))      # transformers: its buffers are not
        return cls(cls.config_class.from_dict(config))


def check(header: Header, place: Place, table: list[_original.Row], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises FinetuneError unless the file has the tensors of the table, in their shapes, and no others that matter."""
    kind, prefix = place
    found = {name.removeprefix(prefix): shape for name, (_, shape) in header.tensors.items() if name.startswith(prefix)}
    wanted = {row.theirs: row.shape(shapes) for row in table if row.theirs}
    missing = [name for name in wanted if name not in found]
    other = [name for name in wanted if name in found and found[name] != wanted[name]
             and not (found[name] == wanted[name][:2] and wanted[name][2:] == (1, 1))]
    droppable = _original.DROPPED if kind.endswith("clip") else None
    strange = [name for name in found if name not in wanted and prefix and not _original.NEEDLESS.search(name)
               and not (droppable and droppable.search(name))]
    if other:
        first = next((name for name in other if name.endswith("conv_in.weight")), other[0])
        raise FinetuneError(f"{len(other)} of {len(wanted)} tensors of its {kind} have other shapes than this model's, for "
                            f"example {prefix}{first}: {found[first]}, and {wanted[first]} is needed; it is of another model")
    if missing:
        raise FinetuneError(f"its {kind} lacks {len(missing)} of {len(wanted)} tensors, for example {prefix}{missing[0]}; "
                            "it is pruned too far, or of another model")
    if strange:
        raise FinetuneError(f"its {kind} has {len(strange)} tensors that this model has no place for, for example "
                            f"{prefix}{strange[0]}; it is of another model")


def part(path: Path, cls: type, component: str, dtype: torch.dtype, config: dict) -> nn.Module:
    """A frozen part in place of a base's own: from a diffusers folder, that of a pipeline or of the part, or from a file.

    `config` is the base's. Raises FinetuneError for a part that is none, or whose shapes or scale are another family's.
    A VAE of SDXL in a file of its own cannot be told from one of SD 1: their shapes are the same."""
    if folder := folder_of(path, component):
        own = Source(str(folder.parent), None, None, {})
        _same_scale(path, own.config(folder.name), config)
        found = own.load(cls, folder.name, dtype)
        wanted = {name: t.shape for name, t in empty(cls, config).state_dict().items()}
        if wrong := [name for name, t in found.state_dict().items() if wanted.get(name) != t.shape]:
            raise FinetuneError(f"{path}: {len(wrong)} tensors are not of the base's shape, for example {wrong[0]}")
        return found
    try:
        known = identify(read_header(path))
        place = known.places.get(component) or (known.places.get("text_encoder") if "text" in component else None)
        if not place:
            raise FinetuneError(f"it holds no {component}, but {', '.join(known.places)}")
        if known.name:
            _same_scale(path, configs(known)[component], config)
        return load(str(path), place, cls, config, dtype)
    except FinetuneError as e:
        raise FinetuneError(str(e) if str(e).startswith(str(path)) else f"{path}: {e}") from None


def folder_of(path: Path, component: str) -> Path | None:
    """The component's own folder, where a path is that or a whole model's."""
    return (path / component if (path / component).is_dir() else path) if path.is_dir() else None


def _same_scale(path: Path, own: dict, config: dict) -> None:
    for key, usual in (("scaling_factor", 0.18215), ("shift_factor", None)):  # diffusers', where a config is silent
        if (mine := own.get(key, usual)) != (base := config.get(key, usual)):
            raise FinetuneError(f"{path}: its {key} is {mine}, and the base's is {base}: it is of another family")


def clip_tokenizer(config: dict) -> CLIPTokenizer:
    """CLIP's, of 49 408 tokens; `config` says what it fills up with. From assets/clip_bpe, in the order of open_clip."""
    from transformers import CLIPTokenizer

    with gzip.open(ASSETS / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in file.read().split("\n")[1:48895]]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]       # the other bytes get letters from 256 on
    letters = [*map(chr, printable), *map(chr, range(256, 512 - len(printable)))]
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["".join(pair) for pair in merges] + list(ENDS)
    settings = {key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token", "model_max_length")}
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, **settings)
