"""Extract the nearest LoRA to what training has changed in a full model."""

from functools import partial
from pathlib import Path

from finetune import registry
from finetune.artifact import Artifact, published
from finetune.commands import _lora
from finetune.commands._base import dtype
from finetune.errors import FinetuneError
from finetune.families._original import NEEDLESS
from finetune.formats import base as formats
from finetune.header import read_header

TABLES = ("_embedding", "shared", "embed_tokens", "relative_attention_bias")     # whose rows are looked up: no layers


def add_arguments(parser) -> None:
    parser.add_argument("--base", required=True, help="`tiny`, a diffusers folder, a .safetensors file or a hub id")
    parser.add_argument("--tuned", required=True, help="the same model after training, likewise")
    _lora.cut_arguments(parser, required=True)
    parser.add_argument("--dtype", default="float16", help="of the written tensors: float32, bfloat16 or float16")
    parser.add_argument("--to", default="kohya", metavar="FORMAT", help="kohya, which most tools read, or diffusers")
    parser.add_argument("--family", default="sd1")
    parser.add_argument("--json", action="store_true", help="print the error of every layer as JSON")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .safetensors file that does not exist yet")


def run(args) -> int:
    from finetune.families._source import check_family, locate
    from finetune.lowrank import differences, error, packed

    size, target, spec = _lora.cut(args), dtype(args.dtype), registry.find("families", args.family).SPEC
    _lora.new_file(args.out)
    formats.check_kind(args.to, "lora")
    sources = [locate(path) for path in (args.base, args.tuned)]
    for source in sources:
        check_family(source, spec.name, registry.names("families"))
    found, other = differences(pairs(*sources, spec), lambda stem: not stem.endswith(TABLES), size)
    tensors, found = packed(found, target)
    metadata = _lora.titled(args.out) | {
        "ss_sd_model_name": sources[0].name,
        "finetune.extracted": f"from {sources[1].name}; {error(found.values(), other):.1%} of the change is left out"}
    formats.save(Artifact("lora", spec.name, tensors, metadata), args.out, args.to, spec)
    print(_lora.said(found, other, args.out, args.json, table=True))
    return 0


def pairs(base, tuned, spec):
    """(canonical name, before, after) of each tensor of the denoiser and the text encoders, one at a time.

    Raises FinetuneError when the two models do not have the same."""
    for part, component in spec.components.items():
        if part == "vae" or not (base.has(component) and tuned.has(component)):     # T5 may be missing
            continue
        before, after = (readers(source, component) for source in (base, tuned))
        if unlike := {name for name in before.keys() ^ after.keys() if not NEEDLESS.search(name)}:
            raise FinetuneError(f"--tuned {tuned.name}: {len(unlike)} tensors of its {component} are only in one "
                                f"of the models, for example {min(unlike)}; both must be of the same architecture")
        for name in sorted(before.keys() & after.keys()):
            old, new = before[name](), after[name]()
            if old.shape != new.shape:
                raise FinetuneError(f"--tuned {tuned.name}: {component} {name} has the shape {tuple(new.shape)}, "
                                    f"in --base {tuple(old.shape)}; both must be of the same architecture")
            if old.is_floating_point():
                yield f"{part}.{name}", old, new


def readers(source, component: str) -> dict:
    """{name of a tensor: what reads it} of a component in a file, in a folder or on the hub, in its widest variant."""
    from finetune.families import _single
    from finetune.families._source import Unreachable

    if isinstance(source, _single.SingleFile):
        return _single.each(source, component)
    for variant in ("", ".fp16"):
        patterns = [f"{component}/*model{variant}.safetensors", f"{component}/*model{variant}-*-of-*.safetensors"]
        folder = Path(source.path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            try:
                folder = Path(snapshot_download(source.path, revision=source.revision, allow_patterns=patterns))
            except OSError as e:
                raise Unreachable(f"{source.path}: its {component} cannot be fetched: {e}") from None
        if files := [file for pattern in patterns for file in sorted(folder.glob(pattern))]:
            return {published(name.removeprefix("text_model.")): partial(read, file, name)
                    for file in files for name in read_header(file).tensors}
    raise FinetuneError(f"{source.path}: there is no .safetensors file of its {component}")


def read(file: Path, name: str):
    """One tensor. Each opening is a mapping of its own, so that what has been read does not stay in memory."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)
