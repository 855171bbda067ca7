"""Put a run onto the Hugging Face hub, with a card that says what it is."""

import tempfile
from pathlib import Path

from finetune.errors import FinetuneError


def add_arguments(parser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder that is done")
    parser.add_argument("--to", required=True, metavar="USER/NAME", help="the repository; it is made if it is not there")
    parser.add_argument("--licence", required=True, metavar="ID",
                        help="as the hub names it, such as creativeml-openrail-m or cc-by-4.0")
    parser.add_argument("--dry-run", type=Path, metavar="DIR",
                        help="write what would be pushed into this new folder, and push nothing")


def run(args) -> int:
    from finetune.train import card

    card.check_name(args.to)
    if args.dry_run:
        files = card.write(args.run, args.dry_run, args.to, args.licence)
        print("\n".join(f"{file.stat().st_size:>12,}  {file}" for file in files))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        files = card.write(args.run, Path(folder), args.to, args.licence)
        print(upload(Path(folder), args.to, f"{len(files)} files of {args.run.resolve().name}"))
    return 0


def upload(folder: Path, to: str, message: str) -> str:
    """The address. The token is huggingface_hub's own, of `hf auth login` or HF_TOKEN. Raises FinetuneError, without it."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    from finetune.train.export import public

    unreachable = HfHubHTTPError.__bases__      # what its HTTP library raises, whichever it is
    try:
        huggingface_hub.create_repo(to, exist_ok=True)
        huggingface_hub.upload_folder(repo_id=to, folder_path=folder, commit_message=message)
    except LocalTokenNotFoundError:
        raise FinetuneError(f"--to {to}: nobody is logged in; `hf auth login` first, or set HF_TOKEN") from None
    except unreachable as e:
        raise FinetuneError(f"--to {to}: cannot be pushed: {public(str(e).strip()).splitlines()[0]}") from None
    return f"https://huggingface.co/{to}"
