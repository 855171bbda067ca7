"""Damaged and lying files each give one clear line, and exit code 2."""

import json
import re
import struct

import pytest
import torch
from safetensors.torch import save

from finetune.cli import main

PATH = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_"
WIDE = {"ss_base_model_version": "sdxl_base_v1-0", "format": "pt"}


def lora(rank=2, width=128, alpha=1.0, modules="qkv"):
    torch.manual_seed(0)
    found = {}
    for m in modules:
        found |= {f"{PATH}{m}.lora_down.weight": torch.randn(rank, width), f"{PATH}{m}.lora_up.weight": torch.randn(64, rank),
                  f"{PATH}{m}.alpha": torch.tensor(alpha)}
    return found


def changed(name, value):
    return lora() | {PATH + name: value}


def peft():
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    return {f"{name}.lora_A.weight": torch.ones(2, 128), f"{name}.lora_B.weight": torch.ones(64, 2)}


def header(edit):
    """The file with another header of the same length of data."""
    data = save(lora())
    length = struct.unpack("<Q", data[:8])[0]
    text = edit(data[8:8 + length].decode().rstrip()).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length:]


def overlap(text):
    entries = json.loads(text)
    one, two = [name for name in entries if name.endswith("lora_up.weight")][:2]
    entries[two]["data_offsets"] = entries[one]["data_offsets"]
    return json.dumps(entries)


def twice(text):
    name = json.dumps(f"{PATH}q.alpha")
    return text[:-1] + f',{name}:{{"dtype":"F32","shape":[],"data_offsets":[0,4]}}}}'


FILES = {
    "all zero": (save(lora() | {f"{PATH}{m}.lora_up.weight": torch.zeros(64, 2) for m in "qkv"}),
                 "FAIL not zero .*0 of 3 changes"),
    "one NaN": (save(changed("k.lora_up.weight", torch.full((64, 2), torch.nan))),
                r"FAIL finite .*8 of 9 tensors; not denoiser\..*to_k"),
    "an overflow": (save(lora() | {f"{PATH}q.lora_up.weight": torch.full((64, 2), 3e38),
                                   f"{PATH}q.lora_down.weight": torch.full((2, 128), 9.0)}),
                    "FAIL finite .*2 of 3 changes; not"),
    "alpha 0": (save(lora(alpha=0.0)), "FAIL not zero"),
    "alpha NaN": (save(changed("k.alpha", torch.tensor(torch.nan))), "to_k.alpha is nan for rank 2: no scale"),
    "alpha huge": (save(changed("k.alpha", torch.tensor(1e30))), "to_k.alpha is 1e\\+30 for rank 2: no scale"),
    "ranks": (save(changed("k.lora_up.weight", torch.ones(64, 3))), r"\(2, 128\) and \(64, 3\) do not fit"),
    "half": (save({k: t for k, t in lora().items() if "k.lora_up" not in k}), "lacks its up half"),
    "bomb": (save({f"{PATH}k.lora_down.weight": torch.ones(1, 2**15), f"{PATH}k.lora_up.weight": torch.ones(2**15, 1)}),
             "a change of 1,073,741,824 numbers: more than any layer has"),
    "cut": (save(lora())[:-5], "its tensors end at byte"),
    "cut in the header": (save(lora())[:100], "not a sound safetensors file: a header of"),
    "twice": (header(twice), "stands in it twice"),
    "overlapping": (header(overlap), "should start at byte"),
    "another family": (save(lora(width=768), WIDE), "its metadata say sdxl, but its shapes are those of sd1"),
    "another rank": (save(lora(), {"ss_network_dim": "64"}), "its metadata say rank 64, but its tensors have 2"),
    "another alpha": (save(lora(), {"ss_network_alpha": "16"}), "its metadata say alpha 16, but its tensors have 1"),
    "another rank for peft": (save(peft(), {"lora_adapter_metadata": '{"unet.r": 64, "unet.lora_alpha": 1}'}),
                              "its metadata say rank 64, but its tensors have 2"),
    "a rank that is none": (save(peft(), {"lora_adapter_metadata": '{"unet.r": [2]}'}), "is not what diffusers writes"),
    "whole numbers": (save(changed("k.lora_up.weight", torch.ones(64, 2, dtype=torch.int32))),
                      "lora_B has numbers of the type int32"),
    "a module twice": (save(lora() | peft()), "and another key both mean .*attn2.to_k.lora_A"),
    "no tensors": (save({}), "no format reads it: kind unknown, keys none"),
    "a token of zeros": (save({"emb_params": torch.zeros(2, 128)}), "FAIL not zero .*0 of 1 tensors"),
    "a foreign key": (save(lora() | {"lora_unet_what_is_this.alpha": torch.tensor(1.0)}),
                      "lora_unet_what_is_this.alpha': no name of an adapter"),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_and_lying_files(tmp_path, capsys, name):
    content, said = FILES[name]
    (tmp_path / "x.safetensors").write_bytes(content)
    assert main(["verify", str(tmp_path / "x.safetensors"), "--family", "sd1"]) == 2
    found = capsys.readouterr()
    assert re.search(said, " ".join((found.out + found.err).split())) and "Traceback" not in found.err
    assert len(re.findall("FAIL|finetune: error", found.out + found.err)) == 1


def test_a_file_of_another_base_and_what_tools_make_of_it(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    # More digits than Python reads, and what stands for the rank.
    path.write_bytes(save(lora(width=768), {"ss_network_dim": "9" * 5000, "ss_network_alpha": "0.0"}))
    assert main(["verify", str(path)]) == 0
    assert "tools                        loads fully in diffusers, ComfyUI" in capsys.readouterr().out
    assert main(["verify", str(path), "--base", "tiny", "--json"]) == 2
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["x.safetensors"]}
    assert not checks["fits the base"]["passed"] and "but the base has (64, 128)" in checks["fits the base"]["found"]
    path.write_bytes(save(lora() | {f"{PATH}q.dora_scale": torch.ones(1, 128)}))
    assert main(["verify", str(path)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "sd-scripts, stable-diffusion.cpp: wrongly 2/3: it does not apply DoRA by columns as trained" in told
    assert main(["convert", str(path), "--to", "diffusers", "--out", str(tmp_path / "z.safetensors")]) == 2
    assert "cannot hold adapters of the kind dora; kohya can (the magnitudes would be lost)" in capsys.readouterr().err
