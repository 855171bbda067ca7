"""Prove that an adapter file holds what it should, and that diffusers loads just that."""

from pathlib import Path


def add_arguments(parser) -> None:
    parser.add_argument("file", type=Path, help="an adapter")
    parser.add_argument("--base", default="tiny", help="the base it is for: `tiny`, a diffusers folder or a hub id")
    parser.add_argument("--family", default="sd1")
    parser.add_argument("--json", action="store_true", help="the result as JSON")


def run(args) -> int:
    import torch

    from finetune import registry
    from finetune.errors import FinetuneError
    from finetune.train import verify

    if not args.file.is_file():
        raise FinetuneError(f"{args.file}: there is no such file")
    family = registry.find("families", args.family).load(args.base, torch.float32)
    checks = verify.verify(args.file, family)
    print(verify.as_json({args.file.name: checks}) if args.json else f"{args.file}\n{verify.table(checks)}")
    return 0 if all(check.passed for check in checks) else 2
