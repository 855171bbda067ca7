"""A base in 4 or 8 bits: what is trained on it is as exact, as proven and as wide as on any other."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from finetune.families import base as families
from finetune.families import sd1
from finetune.families._quantized import QuantizedConv2d, QuantizedLinear, quantize
from finetune.families._source import Changes

LORA = "method={kind: lora, rank: 2, dropout: 0.1, text: {targets: [all]}}"
TWO = ["--set", "train.max_steps=2", "--set", "every.checkpoint=1", "--set", "every.log=1"]


def losses(run) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def proofs(run) -> set[str]:
    found = json.loads((run / "adapter" / "verify.json").read_text())["small.safetensors"]
    assert all(check["passed"] for check in found), found
    return {check["name"] for check in found}


@pytest.fixture(scope="module")
def plain():
    return {}


@pytest.mark.parametrize("kind, bits, close", [("nf4", 4.5, 0.1), ("int8", 8.5, 0.02)])
def test_a_lora_on_few_bits_is_float32_proven_and_goes_on_exactly(kind, bits, close, recipe, train, tmp_path, capsys, plain):
    words = ["--set", LORA, *TWO]
    if not plain:
        assert train(recipe, tmp_path / "plain", *words) == 0
        plain["losses"] = losses(tmp_path / "plain")
    words += ["--set", f"base.quantize={kind}"]
    run = tmp_path / "run"
    assert train(recipe, run, *words) == 0
    assert f"(sd1, epsilon, float32, {kind})" in capsys.readouterr().err
    assert losses(run) == pytest.approx(plain["losses"], rel=close) and losses(run) != plain["losses"]
    file = run / "adapter" / "small.safetensors"
    assert {t.dtype for t in load_file(file).values()} == {torch.float32}
    assert {"diffusers at strength 0.5", "diffusers at strength 1"} <= proofs(run)

    whole = file.read_bytes()       # cut after its first step, the run gives the same bytes
    (run / "adapter").rename(tmp_path / "whole")
    (run / "checkpoints" / "step-00000002").rename(tmp_path / "gone")
    assert train(recipe, run, *words) == 0 and file.read_bytes() == whole
    assert train(recipe, run, *words, "--set", "base.quantize=null") == 2
    assert "base.quantize" in capsys.readouterr().err


@pytest.mark.parametrize("variant, own", [("dora", "{rank: 2}"), ("oft", "{block: 8}"), ("lokr", "{targets: [conv]}")])
def test_other_variants_take_the_whole_weight_and_are_proven_too(variant, own, recipe, train, tmp_path):
    words = f"method={{kind: lora, variant: {variant}, {own[1:-1]}}}"
    assert train(recipe, tmp_path / "run", "--set", words, *TWO, "--set", "base.quantize=nf4") == 0
    assert {"merged by finetune at 0.5", "merged by finetune at 1"} <= proofs(tmp_path / "run")


def test_what_trains_or_changes_the_weights_themselves_is_refused(recipe, train, tmp_path, capsys):
    for method in ("{kind: full}", "{kind: vae_decoder}"):
        assert train(recipe, tmp_path / "run", "--set", f"method={method}", "--set", "base.quantize=int8") == 2
        assert "trains weights of the base, or a copy, which base.quantize: int8 holds in few bits" in capsys.readouterr().err
    assert train(recipe, tmp_path / "run", "--set", "base.adapters=[x]", "--set", "base.quantize=int8") == 2
    assert "merge them first" in capsys.readouterr().err


@pytest.mark.parametrize("make, kind, bits, error", [
    (lambda: nn.Linear(320, 640), "nf4", 4.5, 0.1), (lambda: nn.Linear(320, 640), "int8", 8.5, 0.01),
    (lambda: nn.Conv2d(64, 96, 3, stride=2, padding=1), "nf4", 8.5, 0.01)])
def test_a_layer_gives_the_same_in_training_and_at_rest_and_keeps_no_whole_weight(make, kind, bits, error):
    torch.manual_seed(0)
    layer = make().requires_grad_(False)
    weight, part = layer.weight, nn.ModuleDict({"blocks": nn.ModuleList([layer]), "out": nn.Linear(8, 8)})
    quantize(part, kind)
    few = part["blocks"][0]
    assert type(few) in (QuantizedLinear, QuantizedConv2d) and type(part["out"]) is nn.Linear
    stored = sum(p.nbytes for p in few.packed.parameters())
    assert 8 * stored / weight.numel() <= bits
    assert 0 < (few.weight - weight).norm() / weight.norm() < error
    kept = []
    x = torch.randn((2, 3, 320) if isinstance(few, nn.Linear) else (2, 64, 9, 9), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = few(x)
    assert max(kept, default=0) < weight.numel()
    again, plain = x.detach().clone().requires_grad_(), make()
    plain.weight, plain.bias = few.weight, layer.bias
    wanted = plain(again)
    (y.square().sum() + wanted.square().sum()).backward()
    assert torch.equal(y, wanted) and torch.equal(y, few.eval()(x)) and torch.equal(x.grad, again.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert few(x).dtype == torch.bfloat16
    before = few.weight
    assert torch.equal(few.to(torch.bfloat16).weight, before)       # the numbers are not cast with the rest


def test_the_vae_stays_whole_and_text_states_have_a_key_of_their_own():
    family, plain = sd1.load("tiny", changes=Changes(quantize="int8")), sd1.load("tiny")
    for part, few in (("denoiser", True), ("text", True), ("vae", False)):
        assert any(isinstance(m, (QuantizedLinear, QuantizedConv2d)) for m in family.parts[part].modules()) == few
        assert (families.fingerprint({part: family.parts[part]}) != families.fingerprint({part: plain.parts[part]})) == few
    assert family.parts["denoiser"].dtype == torch.float32
