"""What the machine can do: the only file that asks about CUDA."""

import ctypes
import os
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import torch
from torch.overrides import TorchFunctionMode

from finetune.errors import FinetuneError


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4       # malloc.h
MADV_DONTNEED = 4                           # sys/mman.h
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


def best() -> torch.device:
    """Where sampling runs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def name(device: torch.device) -> str:
    """What decides how the device rounds: the GPU's model, or the CPU's vector instructions."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


def check_precision(mixed_precision: str, dtype: str, device: torch.device) -> None:
    """Raise FinetuneError for a number format that this device does not have."""
    if device.type == "cuda":
        if "bf16" == mixed_precision or dtype == "bfloat16":
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                field = "train.mixed_precision: bf16" if mixed_precision == "bf16" else "base.dtype: bfloat16"
                raise FinetuneError(f"{field}: {torch.cuda.get_device_name(device)} has no bfloat16; use fp16")
    elif mixed_precision == "fp16":
        raise FinetuneError(f"train.mixed_precision: fp16 needs a CUDA device, this run is on {device.type}; use bf16 or 'no'")
    elif dtype == "float16":
        raise FinetuneError(f"base.dtype: float16 needs a CUDA device, this run is on {device.type}; use float32")


def exact(like: torch.Tensor):
    """Inside, autocast is off on the device of this tensor; the meta device has none."""
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def set_deterministic(on: bool, device: torch.device) -> None:
    """Allow a GPU nothing but kernels that give the same bits every time; an operation that has none raises RuntimeError. A
    CPU is left alone: there they all do.

    Torch's flash and memory-efficient attention then take their deterministic way back, and cuDNN's, which has none, is not
    chosen (sdp_utils.cpp, attention_backward.cu). cuBLAS reads its variable once, before its first product."""
    if device.type == "cuda":
        if on:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(on)


def memory_mb(device: torch.device) -> int:
    """Peak memory of the device so far; on the CPU the resident memory of the process."""
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return used // 2**20


def memory_bytes() -> int:
    """What there is to fit in: the GPU's memory, or the machine's."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else psutil.virtual_memory().total


def product_rate(dtype: torch.dtype) -> float:
    """The best of ten products of square matrices, in operations per second: what nothing on this machine is faster than."""
    where, best_rate = best(), 0.0
    size = 8192 if where.type == "cuda" else 2048
    a = torch.randn(size, size, device=where, dtype=dtype)
    for _ in range(10):
        begin = time.perf_counter()
        a @ a
        if where.type == "cuda":
            torch.cuda.synchronize()
        best_rate = max(best_rate, 2 * size**3 / (time.perf_counter() - begin))
    return best_rate


def keep_memory() -> None:
    """Have the C library keep freed memory for the next step. glibc by default gives every large block back to the system,
    which clears it page by page when it is wanted again: a fifth of a step at SD 1.5's size (docs/performance.md)."""
    if libc := glibc():
        for setting, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(setting, value)


def spare_memory() -> None:
    """Give back, with glibc, what is not in use between two phases of a run: freed memory, and the pages of mapped files, such
    as float32 weights that were only read for their hash. These come back, from the system's own cache, when they are touched.
    A mapping of which a single page was written to is left alone: what it holds is in no file."""
    if not (libc := glibc()):
        return
    libc.malloc_trim(0)
    libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    mapping = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ [1-9]\d* +/(?!dev/).*\n((?:[A-Z]\w+: .*\n)+)", re.MULTILINE)
    for start, end, about in mapping.findall(Path("/proc/self/smaps").read_text(errors="replace")):
        if all(f"{own}: 0" in " ".join(about.split()) for own in ("Anonymous", "Swap")):
            libc.madvise(int(start, 16), int(end, 16) - int(start, 16), MADV_DONTNEED)


class Sparing(TorchFunctionMode):
    """Inside, `spare_memory` for every quarter of a GiB that is made: a file of float32 that is cast while it is mapped would
    stay beside what it is cast to."""

    made = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.count(found)
        return found

    def count(self, t: torch.Tensor) -> None:
        self.made += 0 if t.is_meta else t.nbytes
        if self.made >= 2**28:
            self.made = 0
            spare_memory()


def glibc() -> ctypes.CDLL | None:
    """The C library, where it is this one."""
    return libc if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version") else None


def set_threads(threads: int | None) -> int:
    """Use that many CPU threads, or all physical cores shared out over the processes of this machine.

    `accelerate launch` puts OMP_NUM_THREADS=1 on a single process, which would leave most of the machine idle."""
    if threads is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = max(1, min(available, psutil.cpu_count(logical=False) or available) // processes)
    torch.set_num_threads(threads)
    return threads
