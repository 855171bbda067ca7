"""The run directory as an interface: which path is what.

    recipe.yaml (as given)  resolved.yaml  run.json (identity)  data.parquet  metrics.jsonl  log.txt
    checkpoints/step-00000250/  previews/step-00000250.png  adapter/NAME.safetensors
"""

import copy
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from finetune.disk import alive, forsaken, read_json, write_json, writing
from finetune.errors import FinetuneError
from finetune.records import Identity, Owner, measured


class RunFolder:
    def __init__(self, root: Path, name: str):
        """`name` is the recipe's: it names the adapter, so that equal runs in two folders write equal files."""
        self.root, self.name = root if root.name not in ("", "..") else root.resolve(), name
        root = self.root
        self._pending: list[str] | None = []        # what was said before the folder was made
        self.recipe, self.resolved, self.identity = root / "recipe.yaml", root / "resolved.yaml", root / "run.json"
        self.data, self.metrics, self.log = root / "data.parquet", root / "metrics.jsonl", root / "log.txt"
        self.checkpoints, self.previews, self.adapters = root / "checkpoints", root / "previews", root / "adapter"
        self.best = self.checkpoints / "best.safetensors"

    def say(self, line: str) -> None:
        """To the terminal and to log.txt, as soon as the folder is this run's."""
        print(line, file=sys.stderr, flush=True)
        if self._pending is not None:
            self._pending.append(line)
        else:
            with open(self.log, "a", encoding="utf-8") as f:
                f.write(line + "\n")

    def adapter(self, format_name: str, first: bool, name: str = "") -> Path:
        """The file of an export: the recipe's first format has the plain name, the run's if there is no other; others carry
        their own."""
        return self.adapters / f"{name or self.name}{'' if first else f'.{format_name}'}.safetensors"

    def of_best(self) -> "RunFolder":
        """The same run, but its exports go into a folder of their own."""
        other = copy.copy(self)
        other.adapters = self.adapters / "best"
        other.adapters.mkdir(exist_ok=True)
        return other

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def preview(self, step: int) -> Path:
        return self.previews / f"step-{step:08d}.png"

    def begun(self) -> bool:
        return self.identity.exists()

    def known(self) -> Identity | None:
        """The identity of the run in the folder; None when there is none. Raises FinetuneError when it is damaged."""
        try:
            return read_json(self.identity, Identity) if self.begun() else None
        except FinetuneError as e:
            raise FinetuneError(f"{e}; so what the run is cannot be told. Put it back, or have --fresh move the folder "
                                "aside and start anew") from None

    def fingerprint(self) -> str:
        """A hash of what the run is, by which its checkpoints know it. Raises FinetuneError when that is damaged."""
        exact = (self.known() or {}).get("exact")
        return hashlib.sha256(json.dumps(exact, sort_keys=True).encode()).hexdigest()

    def check_ours(self) -> None:
        """Raise FinetuneError for a folder with anything in it that is not a run."""
        with self._writing():
            # A start that was killed before it wrote run.json leaves no more than log.txt and hidden parts of files.
            strange = not self.begun() and any(p.is_file() and p.name != self.log.name and not p.name.startswith(".")
                                               for p in self.root.rglob("*"))
        if strange:
            raise FinetuneError(f"{self.root} holds files, but no run of ours (no run.json): choose another folder with --run")

    def logged(self) -> list[dict]:
        """The lines of metrics.jsonl, without the last if it is being written. Raises FinetuneError for a damaged one."""
        lines = self.metrics.read_bytes().splitlines(keepends=True) if self.metrics.exists() else []
        try:
            return [measured(line) for line in lines if line.endswith(b"\n")]
        except ValueError as e:
            raise FinetuneError(f"{self.metrics} is damaged: {e}; training on mends it") from None

    def lock(self, words: Sequence[str] = ()) -> None:
        """Hold the folder until this process ends, however it ends; `words` of the command line would continue its run.
        Raises FinetuneError when another process holds it."""
        with self._writing():
            self.root.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self._beside("lock"))
            try:
                self._lock.acquire(timeout=0.5)     # `finetune status` holds it for a moment
            except Timeout:
                who = self.last_owner() or {}
                pid, host, started = (who.get(word, "?") for word in ("pid", "host", "started"))
                raise FinetuneError(f"{self.root} is in use by process {pid} on {host}, started {started}; wait for it, stop "
                                    "it (finetune stop), or start beside it with --run DIR") from None
            write_json(self._beside("owner"), {"pid": os.getpid(), "host": socket.gethostname(),
                                               "started": time.strftime("%Y-%m-%d %H:%M:%S"),
                                               "words": list(words), "working_folder": os.getcwd()})

    def owner(self) -> Owner | None:
        """Who holds the folder, as `last_owner` says. None when nobody does, whatever an ended process left lying."""
        lock = FileLock(self._beside("lock"))
        try:
            if not self._beside("lock").exists():
                return None
            lock.acquire(blocking=False)
            lock.release()
            return None
        except OSError as e:        # it is held, as Timeout says; or cannot be asked, on a read-only disk or as another user
            owner = self.last_owner()
            if owner and owner["host"] == socket.gethostname():
                return owner if alive(owner["pid"]) else None       # who looks as we do holds it for a moment too
            return owner if isinstance(e, Timeout) else None

    def last_owner(self) -> Owner | None:
        """Who held the folder last; None when nobody did, or it cannot be told."""
        try:
            return read_json(self._beside("owner"), Owner)
        except (OSError, FinetuneError):
            return None

    def _beside(self, kind: str) -> Path:
        """Beside the folder, not in it: the folder may be moved aside. One place whatever link it is reached by."""
        place = self.root.resolve()
        return place.parent / f".{place.name}.{kind}"

    def set_aside(self) -> Path:
        """Move the whole folder to the first free NAME.old-N."""
        number = next(n for n in range(1, 10**6) if not self._old(n).exists())
        with self._writing():
            self.root.rename(self._old(number))
        return self._old(number)

    def _old(self, number: int) -> Path:
        return self.root.with_name(f"{self.root.name}.old-{number}")

    def create(self, needed_bytes: int) -> None:
        """Make the folders. Raises FinetuneError when they cannot be written or the disk has no room for the run."""
        with self._writing():
            for folder in self._folders():
                folder.mkdir(parents=True, exist_ok=True)
            for torn in filter(forsaken, sorted(self.root.rglob(".*.part"))):   # a torn checkpoint is a folder
                shutil.rmtree(torn) if torn.is_dir() else torn.unlink(missing_ok=True)
            self.check_writable()
        self.check_room(needed_bytes)
        said, self._pending = self._pending or [], None
        with open(self.log, "a", encoding="utf-8") as f:
            f.writelines(line + "\n" for line in said)

    def check_writable(self) -> None:
        """Raise FinetuneError for a folder of the run that is there and cannot be written."""
        with self._writing():
            for folder in filter(Path.exists, self._folders()):
                probe = folder / ".writable"
                probe.write_bytes(b"")
                probe.unlink()

    def _folders(self) -> tuple[Path, ...]:
        return self.root, self.checkpoints, self.previews, self.adapters

    def check_room(self, needed_bytes: int) -> None:
        """Raise FinetuneError when the disk has less room."""
        existing = next(p for p in (self.root.resolve(), *self.root.resolve().parents) if p.exists())
        if (free := shutil.disk_usage(existing).free) < needed_bytes:
            raise FinetuneError(f"the disk of {self.root} has {free / 1e6:,.0f} MB free, but the run may need "
                                f"{needed_bytes / 1e6:,.0f} MB; make room or choose another disk with --run")

    def _writing(self):
        return writing(f"the run folder {self.root}", "; choose another with --run")

    @classmethod
    def of(cls, root: Path) -> "RunFolder":
        """The run in a folder. Raises FinetuneError when there is none."""
        folder = cls(root, root.name)
        if not folder.begun():
            raise FinetuneError(f"{root} is no run folder: it has no run.json")
        return folder
