"""merge, extract and resize on the tiny base, through their commands."""

import hashlib
import json

import pytest
import torch

from finetune import registry
from finetune.artifact import Artifact, modules, read_tensors
from finetune.change import core
from finetune.cli import main
from finetune.families import _single
from finetune.families import base as families
from finetune.families._source import locate
from finetune.formats import base as formats
from finetune.formats._identify import identify
from finetune.header import read_header

SD1 = registry.find("families", "sd1")
TO_K = "denoiser.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "denoiser.mid_block.resnets.0.conv1"
FC1 = "text.text_model.encoder.layers.0.mlp.fc1"


@pytest.fixture(scope="module")
def tiny():
    return SD1.load("tiny", torch.float32)


def lora(tiny, path, ranks: dict[str, int], seed: int, form: str = "kohya", **metadata):
    """A file with a random LoRA of these modules of the tiny base."""
    g, tensors = torch.Generator().manual_seed(seed), {}
    for stem, rank in ranks.items():
        out, *inner = families.weight(tiny.parts, *stem.split(".", 1)).shape
        tensors |= {f"{stem}.lora_A": torch.randn(rank, *inner, generator=g) * 0.1, f"{stem}.alpha": torch.tensor(3.0),
                    f"{stem}.lora_B": torch.randn(out, rank, *[1] * (len(inner) - 1), generator=g) * 0.1}
    formats.save(Artifact("lora", "sd1", tensors, metadata), path, form, SD1.SPEC)
    return path


def changes(path, strength: float = 1.0) -> dict:
    return {".".join(stem): strength * core(m).double() for stem, m in modules(formats.load(path, SD1.SPEC).tensors).items()}


def added(*files) -> dict:
    return {stem: sum(file[stem] for file in files if stem in file) for stem in {stem for file in files for stem in file}}


def lacks(before: dict, after: dict) -> dict[str, float]:
    """{module: the share of the change that is missing}"""
    return {stem: ((before[stem] - after[stem]).norm() / before[stem].norm()).item() for stem in before}


@pytest.fixture
def pair(tiny, tmp_path):
    return (lora(tiny, tmp_path / "a.safetensors", {TO_K: 2, CONV: 3, FC1: 2}, 0, ss_sd_model_name="tiny", ss_steps="9"),
            lora(tiny, tmp_path / "b.safetensors", {TO_K: 4, CONV: 1}, 1, ss_sd_model_name="tiny"))


def test_two_adapters_become_one_exactly(tiny, pair, tmp_path, capsys):
    both = tmp_path / "ab.safetensors"
    assert main(["merge", "--adapter", f"{pair[0]}:0.8", "--adapter", f"{pair[1]}:-0.5", "--out", str(both)]) == 0
    assert "3 modules of rank 2 to 6" in capsys.readouterr().out
    one, two = ([(formats.load(path, SD1.SPEC), s) for path, s in paths]
                for paths in ([(both, 1.0)], [(pair[0], 0.8), (pair[1], -0.5)]))
    with families.merged(tiny.parts, one):
        merged = {stem: families.weight(tiny.parts, *stem.split(".", 1)).clone() for stem in (TO_K, CONV, FC1)}
    with families.merged(tiny.parts, two):
        for stem, weight in merged.items():
            torch.testing.assert_close(families.weight(tiny.parts, *stem.split(".", 1)), weight, rtol=0, atol=1e-6)
    said = read_header(both).metadata
    assert said["finetune.merged"] == "0.8 × a.safetensors + -0.5 × b.safetensors" and said["ss_sd_model_name"] == "tiny"
    assert said["ss_network_module"] == "networks.lora" and "ss_steps" not in said and said["ss_output_name"] == "ab"


def test_into_a_rank_with_the_error_said(pair, tmp_path, capsys):
    both = tmp_path / "ab.safetensors"
    assert main(["merge", "--adapter", str(pair[0]), "--adapter", f"{pair[1]}:2", "--rank", "3",
                 "--json", "--out", str(both)]) == 0
    said = json.loads(capsys.readouterr().out)
    wanted, found = added(changes(pair[0]), changes(pair[1], 2.0)), changes(both)
    measured = lacks(wanted, found)
    assert said["ranks"] == [2, 3]
    for stem, layer in said["layers"].items():
        assert layer["error"] == pytest.approx(measured[stem], rel=1e-3, abs=1e-6)
        assert layer["norm"] == pytest.approx(wanted[stem].norm().item(), rel=1e-5)
    whole = sum(c.square().sum() for c in wanted.values()).sqrt()
    overall = sum((wanted[stem] - found[stem]).square().sum() for stem in wanted).sqrt() / whole
    assert said["error"] == pytest.approx(overall.item(), rel=1e-3) and said["worst"] == max(measured, key=measured.get)


def test_other_kinds_become_a_lora_only_with_a_size_and_without_a_base(pair, tmp_path, capsys):
    g = torch.Generator().manual_seed(3)
    to_k = changes(pair[0])[TO_K].shape
    lokr = {f"{TO_K}.lokr_w1": torch.randn(2, 2, generator=g), f"{TO_K}.alpha": torch.tensor(1.0),
            f"{TO_K}.lokr_w2": torch.randn(to_k[0] // 2, to_k[1] // 2, generator=g)}
    loha = {f"{CONV}.hada_w{i}_{side}": torch.ones(shape) for i in "12" for side, shape in (("a", (4, 2)), ("b", (2, 36)))}
    files = {}
    for kind, tensors in (("lokr", lokr), ("loha", loha | {f"{CONV}.alpha": torch.tensor(1.0)}),
                          ("dora", formats.load(pair[0], SD1.SPEC).tensors | {f"{TO_K}.dora_scale": torch.ones(1, to_k[1])})):
        files[kind] = tmp_path / f"{kind}.safetensors"
        formats.save(Artifact(kind, "sd1", tensors, {}), files[kind], "kohya", SD1.SPEC)
    out = tmp_path / "out.safetensors"
    start = ["merge", "--adapter", str(pair[0]), "--adapter"]
    assert main([*start, str(files["lokr"]), "--energy", "1", "--out", str(out)]) == 0
    assert max(lacks(added(changes(pair[0]), changes(files["lokr"])), changes(out)).values()) < 1e-5
    out.unlink()
    for words, why in (([*start, str(files["lokr"])], "ranks cannot be added up; give --rank"),
                       ([*start, str(files["loha"]), "--rank", "2"],
                        "is a LoHa: the kernel of its weight depends on the base"),
                       ([*start, str(files["dora"]), "--rank", "2"], "has dora_scale: what it changes depends on the base"),
                       (["resize", str(files["dora"]), "--rank", "2"], "finetune extract --base B --tuned M")):
        assert main([*words, "--out", str(out)]) == 2
        assert why in capsys.readouterr().err and not out.exists()


def test_mistakes(tiny, pair, tmp_path, capsys):
    other = tmp_path / "xl.safetensors"
    formats.save(Artifact("lora", "sdxl", formats.load(pair[0], SD1.SPEC).tensors, {}), other, "kohya", SD1.SPEC)
    shape = {f"{TO_K}.lora_A": torch.ones(1, 5), f"{TO_K}.lora_B": torch.ones(7, 1), f"{TO_K}.alpha": torch.ones(())}
    formats.save(Artifact("lora", "sd1", shape, {}), tmp_path / "wide.safetensors", "kohya", SD1.SPEC)
    odd = formats.load(pair[0], SD1.SPEC)
    for name, value in (("nan", torch.nan), ("zero", 0.0)):
        tensors = {key: t if key.endswith("alpha") else t * value for key, t in odd.tensors.items()}
        formats.save(Artifact("lora", "sd1", tensors, {}), tmp_path / f"{name}.safetensors", "kohya", SD1.SPEC)
    nan, out, a = str(tmp_path / "nan.safetensors"), str(tmp_path / "o.safetensors"), ["merge", "--adapter", str(pair[0])]
    for words, why in (([*a, "--adapter", str(other), "--out", out], "xl.safetensors is for sdxl"),
                       ([*a, "--adapter", str(tmp_path / "wide.safetensors"), "--out", out], "they are for different bases"),
                       ([*a, "--out", str(pair[1])], "is there already"),
                       ([*a, "--out", str(tmp_path / "folder")], "a .safetensors file in an existing folder"),
                       ([*a, "--rank", "0", "--out", out], "--rank 0: at least 1"),
                       ([*a, "--base", "tiny", "--rank", "2", "--out", out], "without --base"),
                       ([*a[:2], f"{pair[0]}:0", "--out", out], "changes nothing"),
                       (["resize", nan, "--rank", "1", "--out", out], "6 of its tensors hold NaN or infinity, such as "),
                       ([*a, "--base", "tiny", "--adapter", nan, "--out", out], "hold NaN or infinity"),
                       (["resize", str(tmp_path / "zero.safetensors"), "--rank", "1", "--out", out], "changes nothing"),
                       (["resize", str(pair[0]), "--energy", "1.5", "--out", out], "a share is needed"),
                       (["extract", "--base", "tiny", "--tuned", "tiny", "--rank", "2", "--out", out],
                        "no layer has changed")):
        assert main(words) == 2, words
        assert why in capsys.readouterr().err, why
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_resize_keeps_the_format_and_what_the_file_says(tiny, tmp_path, capsys, form):
    file = lora(tiny, tmp_path / "a.safetensors", {TO_K: 4, CONV: 4, FC1: 2}, 0, form, ss_steps="9", sshs_model_hash="1",
                ss_output_name="a")
    before, sizes = changes(file), {"same": ("--rank", 4), "all": ("--energy", 1.0), "two": ("--rank", 2),
                                    "most": ("--frobenius", 0.9)}
    lost, files = {}, {}
    for name, (word, value) in sizes.items():
        files[name] = tmp_path / f"{name}.safetensors"
        assert main(["resize", str(file), word, str(value), "--json", "--out", str(files[name])]) == 0
        said = json.loads(capsys.readouterr().out)
        lost[name] = lacks(before, changes(files[name]))
        for stem, error in lost[name].items():
            assert said["layers"][stem]["error"] == pytest.approx(error, rel=1e-3, abs=1e-6)
    assert max(lost["same"].values()) < 1e-6 and max(lost["all"].values()) < 1e-6
    for stem, change in before.items():
        s = torch.linalg.svdvals(change.flatten(1))
        assert lost["two"][stem] == pytest.approx((s[2:].norm() / s.norm()).item(), rel=1e-4, abs=1e-6)       # Eckart & Young
        assert lost["most"][stem] <= (1 - 0.9 ** 2) ** 0.5
    header = read_header(files["two"])
    facts = identify(header)
    assert facts["format"] == form and facts["ranks"] == [2] and header.metadata["ss_steps"] == "9"
    data = files["two"].read_bytes()
    own = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little"):]).hexdigest()      # as A1111 and sd-scripts have it
    assert header.metadata["sshs_model_hash"] == own and header.metadata["modelspec.hash_sha256"] == f"0x{own}"
    assert "finetune.resized" in header.metadata and header.metadata["ss_output_name"] == "two"
    assert main(["convert", str(files["two"]), "--to", "kohya", "--out", str(tmp_path / "three.kohya.safetensors")]) == 0
    said = read_header(tmp_path / "three.kohya.safetensors").metadata
    assert said["ss_output_name"] == said["modelspec.title"] == "three"
    assert form == "diffusers" or header.metadata["ss_network_dim"] == header.metadata["ss_network_alpha"] == "2"


def test_extract_finds_what_was_merged(tiny, tmp_path, capsys):
    """Also of models whose files have other names, types and shards."""
    from safetensors.torch import save_file

    file = lora(tiny, tmp_path / "a.safetensors", {TO_K: 4, CONV: 4, FC1: 4}, 0)
    tuned, out = tmp_path / "tuned", tmp_path / "x.safetensors"
    assert main(["merge", "--base", "tiny", "--dtype", "float32", "--adapter", str(file), "--out", str(tuned)]) == 0
    weights = tuned / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = read_tensors(weights)
    tensors["conv_out.bias"] = tensors["conv_out.bias"] + 0.25
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: tensors[name] for name in part},
                  tuned / "unet" / f"diffusion_pytorch_model-0000{i}-of-00002.safetensors")
    weights.unlink()
    text = read_tensors(tuned / "text_encoder" / "model.safetensors")
    save_file({name.removeprefix("text_model."): t for name, t in text.items()}, tuned / "text_encoder" / "model.safetensors")

    capsys.readouterr()
    words = ["extract", "--base", "tiny", "--tuned", str(tuned), "--dtype", "float32", "--out", str(out)]
    assert main([*words, "--rank", "4", "--json"]) == 0
    said, wanted, found = json.loads(capsys.readouterr().out), changes(file), changes(out)
    assert found.keys() == wanted.keys() == said["layers"].keys()       # and no layer that has not changed
    for stem, change in wanted.items():
        torch.testing.assert_close(found[stem], change, rtol=0, atol=1e-5)
        assert said["layers"][stem]["error"] < 1e-4
    bias = len(tensors["conv_out.bias"]) * 0.25 ** 2
    whole = sum(change.square().sum().item() for change in wanted.values()) + bias
    assert said["other"] == pytest.approx((bias / whole) ** 0.5, rel=1e-4) == pytest.approx(said["error"], rel=1e-3)
    metadata = read_header(out).metadata
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "4" and "left out" in metadata["finetune.extracted"]
    out.unlink()
    assert main([*words, "--energy", "0.5"]) == 0
    table = capsys.readouterr().out
    assert "layer " in table.splitlines()[0] and f"{FC1} " in table and "error 0." in table
    for stem, share in lacks(wanted, changes(out)).items():
        assert share <= 0.5 ** 0.5, stem


def test_extract_between_single_files(tiny, tmp_path, monkeypatch, capsys):
    """Of the tiny base, whose config is no published one."""
    base = locate("tiny")
    known = {"model_index": base.index, "scheduler": {}}
    known |= {name: base.config(name) for name in ("unet", "text_encoder", "vae")}
    monkeypatch.setattr(_single, "configs", lambda found: known)
    file, zero = (lora(tiny, tmp_path / f"{scale}.safetensors", {TO_K: 4, CONV: 4, FC1: 4}, scale) for scale in (0, 1))
    for adapter, out in ((f"{zero}:0", "base"), (file, "tuned")):
        assert main(["merge", "--base", "tiny", "--dtype", "float32", "--adapter", str(adapter),
                     "--out", str(tmp_path / out) + ".safetensors"]) == 0
    wanted = changes(file)
    for before in ("tiny", str(tmp_path / "base.safetensors")):
        out = tmp_path / f"from_{before[:4].strip('/')}.safetensors"
        assert main(["extract", "--base", before, "--tuned", str(tmp_path / "tuned.safetensors"), "--rank", "4",
                     "--dtype", "float32",
                     "--out", str(out)]) == 0
        found = changes(out)
        assert found.keys() == wanted.keys()
        for stem, change in wanted.items():
            torch.testing.assert_close(found[stem], change, rtol=0, atol=1e-5)
