"""Make an adapter smaller: the nearest one of a lower rank, with the error said."""

from pathlib import Path

from finetune import registry
from finetune.artifact import Artifact
from finetune.commands import _lora
from finetune.formats import base as formats
from finetune.formats._identify import identify
from finetune.header import read_header


def add_arguments(parser) -> None:
    parser.add_argument("file", type=Path, help="a LoRA, or an adapter of another kind whose change needs no base")
    _lora.cut_arguments(parser, required=True)
    parser.add_argument("--dtype", help="of the written tensors: float32, bfloat16 or float16; the file's own if not given")
    parser.add_argument("--family", default="sd1", help="of a file that does not say it")
    parser.add_argument("--json", action="store_true", help="print the error of every module, as JSON")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .safetensors file that does not exist yet")


def run(args) -> int:
    from finetune.lowrank import error, packed

    size = _lora.cut(args)
    _lora.new_file(args.out)
    spec = registry.find("families", identify(read_header(args.file))["family"] or args.family).SPEC
    before = formats.load(args.file, spec)
    tensors, found = packed(_lora.summed([(args.file, before, 1.0)], size), _lora.dtype(args.dtype, [before]))
    kept = {key: value for key, value in before.metadata.items() if key != "ss_network_args"}     # true no more
    note = _lora.titled(args.out) | {"finetune.resized": f"from {args.file.name}; relative error {error(found.values()):.3g}"}
    formats.save(Artifact("lora", spec.name, tensors, kept | note), args.out, _lora.format_of(args.file), spec)
    print(_lora.said(found, 0.0, args.out, args.json))
    return 0
