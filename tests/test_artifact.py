import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from finetune import artifact
from finetune.artifact import fold_alpha, modules, read_tensors, write_safetensors
from finetune.change import core
from finetune.errors import FinetuneError
from finetune.header import read_header

ROOT = Path(__file__).resolve().parent.parent
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)


def some_tensors():
    torch.manual_seed(0)
    tensors = {f"t.{i}": (torch.randn(3, 5) * 10).to(dtype) for i, dtype in enumerate(DTYPES)}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "strided": torch.randn(4, 6).T}


def lora(rank_alpha, dtype=torch.float32):
    """{module: (rank, alpha)} -> canonical tensors."""
    tensors = {}
    for path, (rank, alpha) in rank_alpha.items():
        tensors[f"{path}.lora_A"] = torch.randn(rank, 6).to(dtype)
        tensors[f"{path}.lora_B"] = torch.randn(8, rank).to(dtype)
        tensors[f"{path}.alpha"] = torch.tensor(float(alpha))
    return tensors


def file_of(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


def test_the_library_reads_what_we_write(tmp_path):
    tensors, path = some_tensors(), tmp_path / "a.safetensors"
    write_safetensors(path, tensors, {"b": "ü\n", "a": "1"})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"a": "1", "b": "ü\n"}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read_tensors(path).items())


def test_equal_content_gives_equal_bytes(tmp_path):
    tensors = some_tensors()
    write_safetensors(tmp_path / "a", tensors, {"x": "1", "y": "2"})
    write_safetensors(tmp_path / "b", dict(reversed(tensors.items())), {"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert struct.unpack("<Q", (tmp_path / "a").read_bytes()[:8])[0] % 8 == 0


def test_header_tells_shapes_metadata_and_scalars(tmp_path):
    scalars = {f"s{i}": torch.tensor(0.5, dtype=dtype) for i, dtype in enumerate(DTYPES[:4])}
    write_safetensors(tmp_path / "a", {"m": torch.zeros(2, 3, dtype=torch.bfloat16), **scalars}, {"k": "v"})
    header = read_header(tmp_path / "a")
    assert header.tensors["m"] == ("BF16", (2, 3)) and header.metadata == {"k": "v"}
    assert header.scalars == dict.fromkeys(scalars, 0.5)


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": torch.zeros(2)}, {})
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact.os, "fsync", full)
    with pytest.raises(FinetuneError, match="No space left") as error:
        write_safetensors(path, {"x": torch.ones(2)}, {})
    assert str(path) in str(error.value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_a_missing_folder_is_the_users_mistake(tmp_path):
    with pytest.raises(FinetuneError, match="No such file"):
        write_safetensors(tmp_path / "no" / "a.safetensors", {"x": torch.zeros(1)}, {})


DAMAGED = {
    "empty file": (b"", "header of 0 bytes"),
    "huge length": (struct.pack("<Q", 2**60) + b"{}" + bytes(64), "header of 1152921504606846976 bytes"),
    "no JSON": (struct.pack("<Q", 4) + b"{{{{", "Expecting"),
    "no text": (struct.pack("<Q", 4) + b"\xff\xfe{}", "decode"),
    "a list": (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
    "deep": (struct.pack("<Q", 200_000) + b"[" * 200_000, ""),
}
MISFITS = {
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "should start at byte 8"),
    "gap": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "should start at byte 4"),
    "longer": ({"a": entry(0, 8)}, 12, "end at byte"),
    "cut": ({"a": entry(0, 8)}, 4, "end at byte"),
    "wrong size": ({"a": entry(0, 8, shape=[3])}, 8, "not F32"),
    "negative": ({"a": entry(0, 8, shape=[-1, -2])}, 8, "whole numbers"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4, "'a' lacks its dtype"),
    "an entry that is none": ({"a": 3}, 0, ""),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "pairs of texts"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_told(tmp_path, name):
    content, why = DAMAGED[name]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(FinetuneError, match="x.safetensors: is not a sound safetensors file") as error:
        read_header(tmp_path / "x.safetensors")
    assert why in str(error.value) and "fetch it again" in str(error.value)


@pytest.mark.parametrize("name", MISFITS)
def test_a_header_that_does_not_describe_its_file_is_told(tmp_path, name):
    header, size, why = MISFITS[name]
    with pytest.raises(FinetuneError, match="not a sound safetensors file") as error:
        read_header(file_of(tmp_path / "x", header, bytes(size)))
    assert why in str(error.value)


@pytest.mark.parametrize("number", ["1_0", "+10", "010", "10-0", "\v10", "1e1", "1,", ""])
def test_numbers_that_are_no_json_are_refused(tmp_path, number):
    text = f'{{"a":{{"dtype":"U8","shape":[10],"data_offsets":[0,{number}]}}}}'.encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + bytes(10))
    with pytest.raises(FinetuneError, match="'a' lacks its dtype, shape or data_offsets"):
        read_header(tmp_path / "x")


def test_a_name_that_stands_twice_is_told(tmp_path):
    one = json.dumps(entry(0, 4))
    with pytest.raises(FinetuneError, match="'a' stands in it twice"):
        read_header(file_of(tmp_path / "x", f'{{"a": {one}, "a": {one}}}'.encode(), bytes(4)))


def test_every_cut_of_a_file_is_told(tmp_path):
    write_safetensors(tmp_path / "a", {"x": torch.zeros(3)}, {"k": "v"})
    whole = (tmp_path / "a").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "a").write_bytes(whole[:length])
        with pytest.raises(FinetuneError):
            read_header(tmp_path / "a")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_a_pickle_is_refused_unread(tmp_path, suffix):
    with pytest.raises(FinetuneError, match="pickle can run any code"):
        read_header(tmp_path / f"absent{suffix}")


def test_a_missing_file_and_a_folder_are_told(tmp_path):
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(FinetuneError, match="cannot be read"):
            read_header(path)


def test_a_pipe_is_told_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(FinetuneError, match="x.safetensors: cannot be read: it is no file"):
        read_header(tmp_path / "x.safetensors")


def test_a_peek_does_not_import_torch(tmp_path):
    write_safetensors(tmp_path / "a", {"x": torch.zeros(2)}, {})
    code = "import sys; from finetune import artifact, header; header.read_header(sys.argv[1])"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True)


def test_changes_of_a_linear_a_pointwise_and_a_spatial_module():
    down, up = torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1)
    tensors = lora({"denoiser.a.to_k": (4, 2)})
    tensors |= {"denoiser.c.lora_A": down, "denoiser.c.lora_B": up, "denoiser.c.alpha": torch.tensor(2.0)}
    tensors |= {"text.p.lora_A": down[:, :, :1, :1], "text.p.lora_B": up, "text.p.alpha": torch.tensor(2.0)}
    found = {key: core(module) for key, module in modules(tensors).items()}

    linear = 0.5 * tensors["denoiser.a.to_k.lora_B"] @ tensors["denoiser.a.to_k.lora_A"]
    assert torch.allclose(found["denoiser", "a.to_k"], linear)
    x = torch.randn(1, 3, 6, 6)
    conv = torch.nn.functional.conv2d
    assert torch.allclose(conv(x, found["denoiser", "c"]), conv(conv(x, down), up), atol=1e-5)
    assert torch.allclose(conv(x, found["text", "p"]), conv(conv(x, down[:, :, :1, :1]), up), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_folding_keeps_every_change_and_leaves_one_alpha(dtype):
    tensors = lora({"text.a": (4, 4), "text.b": (8, 4), "text.c": (4, 3), "text.d": (2, 0)}, dtype)
    folded = fold_alpha(tensors)
    assert {t.item() for name, t in folded.items() if name.endswith("alpha")} == {4.0}
    before, after = ({key: core(module) for key, module in modules(t).items()} for t in (tensors, folded))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[key], after[key], rtol=1e-6, atol=1e-6) for key in before)
    assert folded["text.b.lora_B"] is tensors["text.b.lora_B"]


def test_folding_one_alpha_changes_nothing():
    tensors = lora({"text.a": (4, 2), "text.b": (8, 2)})
    assert fold_alpha(tensors) is tensors


def test_hostile_headers_are_read_or_refused_in_one_line():
    """A seeded sample of `python scripts/faults/headers.py`; the bound on the time is that of a loaded machine."""
    done = subprocess.run([sys.executable, "scripts/faults/headers.py", "--count", "1500", "--seed", "7", "--seconds", "2"],
                          cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "1516/1516 read or refused" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("dtype", ["F4", "C64", "f32", ""])
def test_a_type_that_no_adapter_has_is_told(tmp_path, dtype):
    with pytest.raises(FinetuneError, match="unknown type|lacks its dtype"):
        read_header(file_of(tmp_path / "x", {"a": entry(0, 0, dtype, [0])}))


def test_what_kills_left_of_a_file_is_cleared_when_it_is_written(tmp_path):
    gone, held = (tmp_path / f".a[1].safetensors.{pid}.part" for pid in (2**22 + 1, os.getppid()))
    for file in (gone, held):
        file.write_text("")
    write_safetensors(tmp_path / "a[1].safetensors", {"x": torch.ones(1)}, {})
    assert sorted(tmp_path.iterdir()) == [held, tmp_path / "a[1].safetensors"]
