"""An adapter in the hands of another tool: its own loader's change of every weight, beside ours.

    python scripts/loaders.py ComfyUI SOURCE --base runs/bench/sd15 FILE...

SOURCE is a checkout of the tool, of which nothing but the loader runs, on the CPU in float32; `diffusers` needs none. What
that imports and is not installed (servers, video, audio) becomes an empty module. For each file: how many weights are changed
as by us, to 1e-5 of the largest number in that weight's change, beside how many our receipt (formats/_consumers.py) says.
"""

import argparse
import importlib
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune import registry
from finetune.artifact import published
from finetune.change import change
from finetune.families import _merging, _original
from finetune.families import base as families
from finetune.families._identify import LAYOUTS
from finetune.families._source import quiet
from finetune.formats import base as formats
from finetune.formats import single_file
from finetune.formats._consumers import receipt
from finetune.header import read_header

Changes = Iterator[tuple[str, Tensor]]      # "<part>.<name of ours>" and what is added to that weight
Read = Callable[[Path], Changes]
TOLERANCE = 1e-5


def wanted(name: str):
    """A module of the tool; what it imports and is not there, is empty."""
    while True:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as missing:
            if missing.name in (None, name) or missing.name in sys.modules:
                raise
            print(f"    without {missing.name}", file=sys.stderr)
            empty(missing.name)


def empty(name: str, **members) -> types.ModuleType:
    """A module that has these members, and of every other a mock."""
    module = types.ModuleType(name)
    module.__path__, module.__spec__ = [], importlib.machinery.ModuleSpec(name, None)

    def member(word: str):
        if word.startswith("__"):
            raise AttributeError(word)
        if word[0].isupper():       # a class: it may be in a type or be inherited from
            return type(word, (mock.MagicMock,), {"__class_getitem__": classmethod(lambda cls, inside: cls)})
        return mock.MagicMock(name=word)

    vars(module).update(members, __getattr__=member)
    sys.modules[name] = module
    return module


class Text(nn.Module):
    """A text encoder under the names that it was published with, which transformers < 5.6 also had in memory."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.text_model = encoder


def original(family) -> dict[str, tuple[str, _original.Row]]:
    """{name in the original file: (part, row)}"""
    rows = {}
    for part, module in family.parts.items():
        kind, prefix = LAYOUTS[family.spec.name][family.spec.components[part]]
        for row in _original.rows(kind, [published(name) for name in module.state_dict()]):
            rows[prefix + row.theirs] = part, row
    return rows


def written(family) -> dict[str, Tensor]:
    """The denoiser and the text encoder under the names of the original file."""
    found = {}
    for part in ("denoiser", "text"):
        kind, prefix = LAYOUTS[family.spec.name][family.spec.components[part]]
        own = {published(name): t for name, t in family.parts[part].state_dict().items()}
        found |= {prefix + name: t.clone() for name, t in _original.write(own, _original.rows(kind, own))}
    return found


def tree(tensors: dict[str, Tensor]) -> nn.Module:
    """Plain layers of torch under these names: what `named_modules` of the tool's own model shows."""
    root = nn.Module()
    leaves: dict[str, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        path, _, end = name.rpartition(".")
        leaves.setdefault(path, {})[end] = t
    for path, own in leaves.items():
        above, weight = root, own.get("weight")
        for word in path.split(".")[:-1]:
            if word not in above._modules:
                above.add_module(word, nn.Module())
            above = above.get_submodule(word)
        with torch.device("meta"):
            if "in_proj_weight" in own:
                layer = nn.MultiheadAttention(own["in_proj_weight"].shape[1], 1)
            elif weight is None:
                layer = nn.Module()
            elif weight.ndim == 4:
                layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], bias="bias" in own)
            elif weight.ndim == 2:
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in own)
            else:
                layer = nn.LayerNorm(weight.shape)
        for end, t in own.items():
            setattr(layer, end, nn.Parameter(t, requires_grad=False))
        last = path.rpartition(".")[2]
        for word, child in above._modules.get(last, nn.Module())._modules.items():
            layer.add_module(word, child)
        above.add_module(last, layer)
    return root


def diffusers(family, source: Path) -> Read:
    def read(file: Path) -> Changes:
        pipeline = family.pipeline()
        pipeline.load_lora_weights(str(file))       # raises for names that it does not know
        for part, component in family.spec.components.items():
            for path, layer in getattr(pipeline, component).named_modules():
                if hasattr(layer, "get_delta_weight"):
                    name = path if part == "denoiser" else f"text_model.{path.removeprefix('text_model.')}"
                    yield f"{part}.{name}.weight", layer.get_delta_weight(layer.active_adapters[0])
        pipeline.unload_lora_weights()

    return read


def comfyui(family, source: Path) -> Read:
    """The whole model goes through its loader of checkpoints, from a file of ours."""
    sys.argv = ["main.py", "--cpu", "--force-fp32", "--fp32-text-enc"]
    wanted("comfy.options").enable_args_parsing()
    lora, sd, rows = wanted("comfy.lora"), wanted("comfy.sd"), original(family)
    with tempfile.TemporaryDirectory() as folder:
        single_file.write(family, Path(folder, "model.safetensors"), torch.float32, {})
        model, clip = sd.load_checkpoint_guess_config(f"{folder}/model.safetensors", output_vae=False, output_clip=True)[:2]

    def read(file: Path) -> Changes:
        patched = sd.load_lora_for_models(model, clip, load_file(file), 1.0, 1.0)
        for patcher, old, new in ((patched[0], "", "model."), (patched[1].patcher, "clip_l.", "cond_stage_model.")):
            own = patcher.model.state_dict()
            for key, patch in patcher.patches.items():
                part, row = rows[new + key.removeprefix(old)]
                yield f"{part}.{row.ours[0]}", lora.calculate_weight(patch, own[key].float().clone(), key) - own[key]

    return read


def invokeai(family, source: Path) -> Read:
    width = wanted("invokeai.backend.model_manager.util.model_util").lora_token_vector_length
    convert = wanted("invokeai.backend.patches.lora_conversions.sd_lora_conversion_utils").lora_model_from_sd_state_dict
    wanted("invokeai.backend.model_manager.load")        # first, since it and the next import each other
    patcher = wanted("invokeai.backend.patches.layer_patcher").LayerPatcher
    places = {"lora_unet_": ("denoiser", family.parts["denoiser"]), "lora_te_": ("text", Text(family.parts["text"]))}

    def read(file: Path) -> Changes:
        if width(load_file(file)) != 768:
            raise ValueError(f"taken for another base: its text is {width(load_file(file))} wide")
        for key, patch in convert(load_file(file)).layers.items():
            for prefix, (part, model) in places.items():
                if key.startswith(prefix):
                    path, layer = patcher._get_submodule(model, key.removeprefix(prefix), layer_key_is_flattened=True)
                    found = patch.get_parameters(dict(layer.named_parameters(recurse=False)), weight=1.0)
                    yield from ((f"{part}.{path}.{name}", t.float()) for name, t in found.items())

    return read


def stubs_a1111() -> None:
    """What its extension takes from the web UI around it."""
    if "modules" not in sys.modules:
        mmdit = empty("modules.models.sd3.mmdit", QkvLinear=type("QkvLinear", (nn.Linear,), {}))
        empty("modules", devices=empty("modules.devices", cpu="cpu", dtype=torch.float32),
              sd_models=empty("modules.sd_models", read_state_dict=load_file), shared=empty("modules.shared"),
              models=empty("modules.models", sd3=empty("modules.models.sd3", mmdit=mmdit)))


def a1111(family, source: Path) -> Read:
    """Its UNet and text encoder are those of LDM, here plain layers under their names."""
    sys.path.insert(0, str(source / "extensions-builtin" / "Lora"))
    root, rows = tree(written(family)), original(family)
    stubs_a1111()
    networks = wanted("networks")
    networks.shared.sd_model = types.SimpleNamespace(is_sdxl=False, model=root.model, cond_stage_model=root.cond_stage_model)

    def read(file: Path) -> Changes:
        networks.extra_network_lora = types.SimpleNamespace(errors={})
        net = networks.load_network(file.stem, types.SimpleNamespace(filename=str(file)))
        networks.loaded_networks[:] = [net]
        for path, layer in root.named_modules():
            if getattr(layer, "network_layer_name", None) in net.modules:
                networks.network_apply_weights(layer)
                part, row = rows[f"{path}.weight"]
                yield f"{part}.{row.ours[0]}", layer.weight - layer.network_weights_backup

    return read


def forge(family, source: Path) -> Read:
    """As its load_lora_for_models does it, over the names of its models."""
    memory = empty("backend.memory_management", cast_to_device=lambda t, device, dtype: t.to(device, dtype))
    empty("backend", memory_management=memory).__path__ = [str(source / "backend")]
    lora = wanted("packages_3rdparty.comfyui_lora_collection.lora")
    merge = wanted("backend.patcher.lora").merge_lora_to_weight
    weights, rows, starts = written(family), original(family), {"model.": "", "cond_stage_model.": "clip_l."}
    names = {new + name.removeprefix(old): name for name in weights for old, new in starts.items() if name.startswith(old)}
    depth = dict(num_res_blocks=[2] * 4, channel_mult=[1, 2, 4, 4], transformer_depth=[1] * 6 + [0] * 2,
                 transformer_depth_middle=1, transformer_depth_output=[1] * 9 + [0] * 3)
    model = types.SimpleNamespace(state_dict=lambda: names, diffusion_model=types.SimpleNamespace(config=depth))

    def read(file: Path) -> Changes:
        unet, left = lora.load_lora(load_file(file), lora.model_lora_keys_unet(model, {}))
        text, left = lora.load_lora(left, lora.model_lora_keys_clip(model, {}))
        if len(left) > 12:
            raise ValueError(f"LoRA version mismatch: {len(left)} names")
        for key, patch in (unet | text).items():
            weight, (part, row) = weights[names[key]], rows[names[key]]
            yield f"{part}.{row.ours[0]}", merge([(1.0, patch, 1.0, None, None)], weight, key) - weight

    return read


def sd_scripts(family, source: Path) -> Read:
    sys.path.insert(0, str(source / "networks"))
    unet, text, merge = family.parts["denoiser"], Text(family.parts["text"]), wanted("merge_lora").merge_to_sd_model
    before = [(part, name, m, m.weight) for part, model in (("denoiser", unet), ("text", text))
              for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]

    def read(file: Path) -> Changes:
        merge(text, unet, [str(file)], [1.0], torch.float32)
        for part, name, layer, weight in before:
            if layer.weight is not weight:
                delta, layer.weight = layer.weight - weight, weight
                yield f"{part}.{name}.weight", delta

    return read


TOOLS = {"diffusers": diffusers, "ComfyUI": comfyui, "InvokeAI": invokeai, "A1111": a1111, "Forge": forge,
         "sd-scripts": sd_scripts}


@torch.no_grad()
def compare(tool: str, read: Read, family, file: Path) -> bool:
    """Print a line, and say whether the tool gets as many weights right as our receipt says."""
    said = next(reading for reading in receipt(read_header(file), family.spec.name) if reading.tool == tool)
    artifact = formats.load(file, family.spec)
    ours = {f"{stem}.weight": (p.detach(), how) for stem, p, how in _merging.touched(family.parts, artifact)}
    worst, where, right, other, why = 0.0, "", 0, [], ""
    try:
        for name, theirs in read(file):
            if name not in ours:
                other.append(name)
                continue
            weight, how = ours[name]
            mine = change(how, weight)
            deviation = ((theirs.reshape(mine.shape) - mine).abs().max() / mine.abs().max()).item()
            right += deviation <= TOLERANCE
            worst, where = max((worst, where), (deviation, name))
        why = f"; changed too: {', '.join(other[:3])}" if other else ""
    except Exception as refused:        # whatever another program raises is its answer
        why = f"; refused: {type(refused).__name__}: {str(refused):.80}"
    print(f"{tool:<10} {file.name:<28} {right}/{len(ours)} right, receipt {said.right}/{said.total} {said.outcome}; "
          f"worst {worst:.1e} {where if worst > TOLERANCE else ''}{why}", flush=True)
    return right == said.right and not other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("source", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--base", required=True)
    args = parser.parse_args()
    quiet()
    sys.path.insert(0, str(args.source.resolve()))
    family = registry.find("families", "sd1").load(args.base, torch.float32)
    with torch.no_grad():
        read = TOOLS[args.tool](family, args.source)
    sys.exit(0 if all([compare(args.tool, read, family, file) for file in args.files]) else 1)


if __name__ == "__main__":
    main()
