"""Prove that a file is a sound adapter, for which tools, and what it does to a base."""

from pathlib import Path

from finetune import registry
from finetune.artifact import weights_of
from finetune.commands import _base
from finetune.errors import FinetuneError
from finetune.formats._identify import family_of


def add_arguments(parser) -> None:
    parser.add_argument("file", type=Path, help="an adapter")
    parser.add_argument("--base", help="the base it is for: `tiny`, a diffusers folder, a .safetensors file or a hub id; "
                        "without it only the file is checked")
    parser.add_argument("--revision", help="of a hub model")
    parser.add_argument("--variant", help="of the weight files, such as fp16")
    parser.add_argument("--family", help="of the base; what the file says of itself by default")
    _base.parts_arguments(parser)
    _base.clip_skip_argument(parser)
    parser.add_argument("--json", action="store_true", help="the result as JSON")


def run(args) -> int:
    import torch

    from finetune.train import verify

    if not (file := weights_of(args.file)).is_file():
        raise FinetuneError(f"{args.file}: there is no such file")
    module = registry.find("families", family_of(file, args.family))
    changes = _base.changes(args)
    if args.base:
        checks = verify.verify(args.file, module.load(args.base, torch.float32, args.revision, args.variant, changes))
    else:
        checks = verify.alone(file, module.SPEC)[1] + verify.tools(file, module.SPEC)
    print(verify.as_json({args.file.name: checks}) if args.json else f"{args.file}\n{verify.table(checks)}")
    return 0 if all(check.passed for check in checks) else 2
