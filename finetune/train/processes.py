"""The processes that were asked for.

`accelerate launch --cpu --num_processes 2` (accelerate 1.15) starts one process and says nothing: its plain launcher
sets an address to meet at and leaves the rest to MPI. An order is carried out or it is an error, so the order is read
off the launcher's own command line and given to torch's launcher.
"""

import argparse
import os
import sys

import psutil


def start_missing() -> None:
    """Replace this process by as many as accelerate's launcher was told to start; return when none is missing."""
    wanted = ordered()
    if wanted > 1 and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "WORLD_SIZE" not in os.environ:
        os.execv(sys.executable, [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(wanted),
            "--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"],
            "-m", "--", "finetune", *sys.argv[1:]])     # `--`: torchrun would take our --run for its --run-path


def ordered() -> int:
    """The number of processes on the command line of the launcher that started this one; 1 when there is none."""
    parent = psutil.Process().parent()
    words = parent.cmdline() if parent else []
    if not any("accelerate" in word for word in words[:4]):
        return 1
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int, default=1)
    return parser.parse_known_args(words)[0].num_processes
