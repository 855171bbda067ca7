"""What only a GPU can show: `scripts/gpu_check` runs these."""

import json

import pytest
import torch

from finetune.artifact import read_tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("precision, dtype", [("no", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_a_run_is_proven_and_goes_on_where_it_was_cut(recipe, tmp_path, train, precision, dtype):
    words = ["--set", f"train.mixed_precision={precision!r}", "--set", f"base.dtype={dtype}", "--set", "train.threads=null"]
    assert train(recipe, tmp_path / "run", *words) == 0
    checks = json.loads((tmp_path / "run" / "adapter" / "verify.json").read_text())
    assert all(check["passed"] for found in checks.values() for check in found)
    whole = read_tensors(tmp_path / "run" / "adapter" / "small.safetensors")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in whole.values())

    (tmp_path / "run" / "adapter" / "small.safetensors").unlink()
    (tmp_path / "run" / "checkpoints" / "step-00000006").rename(tmp_path / "gone")
    assert train(recipe, tmp_path / "run", *words) == 0
    for name, tensor in read_tensors(tmp_path / "run" / "adapter" / "small.safetensors").items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=1e-4)       # kernels need not be deterministic


def test_a_deterministic_run_ends_with_the_same_bytes_again(recipe, tmp_path, train):
    words = ["--set", "train.deterministic=true", "--set", "train.mixed_precision=bf16", "--set", "train.threads=null"]
    for name in ("one", "two"):
        assert train(recipe, tmp_path / name, *words) == 0
    one, two = ((tmp_path / name / "adapter" / "small.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
