import os

import psutil
import pytest
import torch

from finetune import device
from finetune.errors import FinetuneError

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")


@pytest.fixture
def card(monkeypatch):
    """A CUDA card with or without bfloat16."""
    def make(bf16: bool):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Old Card 1080")
        return CUDA

    return make


@pytest.mark.parametrize("mixed, dtype", [("no", "float32"), ("fp16", "float32"), ("fp16", "float16"), ("no", "float16")])
@pytest.mark.parametrize("bf16", [True, False])
def test_every_card_has_float32_and_float16(card, bf16, mixed, dtype):
    device.check_precision(mixed, dtype, card(bf16))


@pytest.mark.parametrize("mixed, dtype, field", [
    ("bf16", "float32", "train.mixed_precision: bf16"), ("no", "bfloat16", "base.dtype: bfloat16"),
    ("bf16", "bfloat16", "train.mixed_precision: bf16"), ("fp16", "bfloat16", "base.dtype: bfloat16"),
])
def test_bfloat16_needs_a_card_that_has_it(card, mixed, dtype, field):
    device.check_precision(mixed, dtype, card(True))
    with pytest.raises(FinetuneError, match="Old Card 1080 has no bfloat16; use fp16") as error:
        device.check_precision(mixed, dtype, card(False))       # emulated is not had
    assert str(error.value).startswith(field)


@pytest.mark.parametrize("where", [CPU, MPS])
@pytest.mark.parametrize("mixed, dtype, field", [("fp16", "float32", "train.mixed_precision: fp16"), ("no", "float16", "base.dtype: float16"),
                                                 ("fp16", "float16", "train.mixed_precision: fp16")])
def test_float16_needs_cuda(where, mixed, dtype, field):
    with pytest.raises(FinetuneError, match=f"needs a CUDA device, this run is on {where.type}") as error:
        device.check_precision(mixed, dtype, where)
    assert str(error.value).startswith(field)


@pytest.mark.parametrize("mixed, dtype", [("no", "float32"), ("bf16", "float32"), ("bf16", "bfloat16"), ("no", "bfloat16")])
def test_the_cpu_has_float32_and_bfloat16(mixed, dtype):
    device.check_precision(mixed, dtype, CPU)


@pytest.fixture
def threads():
    """What was set is set again."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("cores, allowed, processes, expected", [
    (8, 16, None, 8), (8, 4, None, 4), (8, 16, 2, 4), (8, 16, 3, 2), (2, 2, 4, 1), (None, 6, None, 6), (8, 16, 64, 1)])
def test_threads_are_the_physical_cores_shared_out(monkeypatch, threads, cores, allowed, processes, expected):
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(allowed)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: allowed)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert device.set_threads(None) == expected == torch.get_num_threads()


def test_a_wished_number_of_threads_is_kept(threads):
    assert device.set_threads(1) == 1 == torch.get_num_threads()


def test_memory_of_the_process_is_told_in_mebibytes():
    assert device.memory_mb(CPU) == pytest.approx(psutil.Process().memory_info().rss / 2**20, rel=0.2)


@pytest.mark.skipif(not device.glibc(), reason="without glibc nothing is given back")
def test_pages_that_are_given_back_hold_what_they_held(tmp_path):
    """Of a file that was only read they are; of one that was written to in memory none is."""
    from safetensors.torch import load_file, save_file

    numbers = torch.arange(2**24, dtype=torch.float32)
    for name in ("read", "written"):
        save_file({"x": numbers}, tmp_path / name)
    read, written = (load_file(tmp_path / name)["x"] for name in ("read", "written"))
    sums = read.sum(), written.sum()
    written[5] = 7
    before = device.memory_mb(CPU)
    device.spare_memory()
    assert before - device.memory_mb(CPU) >= 60
    assert written[5] == 7 and written.sum() == sums[1] + 2 and torch.equal(read, numbers)


def test_deterministic_kernels_are_asked_of_a_gpu_alone(monkeypatch):
    asked = []
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "own")
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    device.set_deterministic(True, CPU)
    device.set_deterministic(False, CUDA)
    assert asked == [False] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == "own"
    device.set_deterministic(True, CUDA)
    assert asked == [False, True] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
