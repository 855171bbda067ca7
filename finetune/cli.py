"""The door: find the command's file, hand it the arguments, turn the end into an exit code.

Nothing heavy is imported before a command runs, so that `finetune --help` answers at once.
"""

import argparse
import atexit
import gc
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr

from finetune import __version__, registry
from finetune.errors import FinetuneError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0 done, 2 the user's mistake, 130 interrupted.

    argparse itself exits, with 0 after --help and 2 for arguments it does not know. Any other exception is
    our mistake: it passes through, and Python prints the traceback and exits with 1."""
    atexit.register(gc.freeze)      # else Python looks through all that torch and diffusers are once more: two seconds
    # A service may be started without them, a terminal may know no Unicode, and a file's name may be none.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w", errors="replace") for stream in (sys.stdout, sys.stderr))
    if sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _run(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("finetune: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough. Python would flush stdout at exit and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (MemoryError, RuntimeError) as error:        # torch's own is one, and torch is not imported here
        if not (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"):
            raise
        print(f"finetune: error\nthere is not enough memory: {str(error).partition('. ')[0] or 'for so much at once'}\n"
              "    fewer pictures at a time, smaller ones, or numbers of 16 bits need less", file=sys.stderr)
        return 2
    except (FinetuneError, OSError) as error:       # and what the system refuses: a full disk, a name that is too long
        process, place = os.environ.get("RANK", "0"), getattr(error, "filename", None)
        told = f"{os.fsdecode(place)}: {error.strerror}" if isinstance(place, (str, bytes)) else error
        print(f"finetune: error{'' if process == '0' else f' in process {process}'}\n{told}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="finetune", usage="finetune COMMAND …", epilog=_commands(),
        description="Fine-tune Stable Diffusion models from a short recipe.",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"finetune {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="`finetune COMMAND --help` lists them")
    chosen = parser.parse_args(arguments or ["--help"])

    command = registry.find("commands", chosen.command)
    of_command = argparse.ArgumentParser(
        prog=f"finetune {chosen.command}", description=registry.summary("commands", chosen.command))
    command.add_arguments(of_command)
    of_command.add_argument("--quiet", action="store_true", help="no bars and no notes on the way, only errors and results")
    words = of_command.parse_args(chosen.arguments)
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere) if words.quiet else nullcontext():
        return command.run(words)


def _commands() -> str:
    names = registry.names("commands")
    width = max(map(len, names))
    lines = [f"  {name:<{width}}  {registry.summary('commands', name)}" for name in names]
    return "\n".join(["commands:", *lines])
