"""Write an adapter in another format; what it does to the base stays the same."""

from dataclasses import replace
from pathlib import Path

from finetune import registry
from finetune.commands._lora import new_file, titled
from finetune.formats import base as formats
from finetune.formats._identify import family_of


def add_arguments(parser) -> None:
    parser.add_argument("file", type=Path, help="an adapter in any format that is read")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="kohya or diffusers")
    parser.add_argument("--family", help="of the base; what the file says of itself by default")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .safetensors file that does not exist yet")


def run(args) -> int:
    registry.check("formats", args.to)
    new_file(args.out)
    spec = registry.find("families", family_of(args.file, args.family)).SPEC
    artifact = formats.load(args.file, spec)
    if artifact.kind != "embedding":        # whose name is what a prompt says
        artifact = replace(artifact, metadata=artifact.metadata | titled(args.out))
    formats.save(artifact, args.out, args.to, spec)
    print(args.out)
    return 0
