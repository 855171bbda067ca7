"""Stop a run after the step it is in, and save it; the same train command continues."""

import os
import signal
import socket
import time
from pathlib import Path

from finetune.errors import FinetuneError
from finetune.runfolder import RunFolder


def add_arguments(parser) -> None:
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--wait", type=float, default=60, metavar="SECONDS", help="how long to wait for its end")


def run(args) -> int:
    folder = RunFolder(args.run, args.run.name)
    owner = folder.owner()
    if owner is None:
        raise FinetuneError(f"{args.run}: nothing is running there; `finetune status` lists the runs")
    if owner["host"] != socket.gethostname():
        raise FinetuneError(f"{args.run}: it runs on {owner['host']}; stop it there")
    try:
        os.kill(owner["pid"], signal.SIGTERM)
    except OSError as e:
        raise FinetuneError(f"{args.run}: process {owner['pid']} cannot be told to stop: {e.strerror}") from None
    end = time.monotonic() + args.wait
    while folder.owner():
        if time.monotonic() > end:
            raise FinetuneError(f"{args.run}: process {owner['pid']} still runs after {args.wait:g} s; it stops after its "
                                "step")
        time.sleep(0.1)
    print(f"{args.run}: stopped and saved")
    return 0
