"""What every method promises, over the registry and the variants of each, on the tiny base."""

import pytest
import torch

from finetune import registry
from finetune.batch import Conditioning
from finetune.errors import FinetuneError
from finetune.families import base as families
from finetune.formats import base as formats
from finetune.recipe import schema

TARGETS = ["all", "conv"]
LORA = {"rank": 2, "alpha": 3.0, "targets": TARGETS, "text": {"rank": 3}}
CASES = {
    "lora": LORA,
    "lora of two ranks": LORA | {"ranks": {"conv": 1, "*.attn2.*": 4}, "alphas": {"to_k": 2.0}},
    "rslora": LORA | {"variant": "rslora"},
    "dora": LORA | {"variant": "dora"},
    "loha": LORA | {"variant": "loha"},
    "lokr": {"variant": "lokr", "factor": 4, "targets": TARGETS, "text": {}},
    "oft": {"variant": "oft", "block": 8, "targets": TARGETS, "text": {}},
}
KINDS = dict.fromkeys(CASES, "lora")        # case -> method


def load():
    return registry.find("families", "sd1").load("tiny")


def build(case: str):
    """The method of a case, as a recipe has it."""
    recipe = schema.Lora(kind=KINDS[case], **CASES[case])
    return registry.find("methods", KINDS[case]).build(**recipe.model_dump(exclude={"kind", "start_from", "until"}), seed=0)


@pytest.fixture(params=CASES)
def installed(request):
    family, method = load(), build(request.param)
    before = {part: {k: v.clone() for k, v in module.state_dict().items()} for part, module in family.parts.items()}
    method.install(family)
    return family, method, before, request.param


def output(family) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=g)
    with torch.no_grad():
        return family.denoise(x, torch.tensor([10, 700]), family.encode_text(["a red circle", ""]), torch.zeros(2, 6))


def train(family, method, steps: int = 3) -> None:
    """A few optimizer steps on a made-up loss."""
    optimizer = torch.optim.AdamW(method.groups(3e-3))
    g = torch.Generator().manual_seed(1)
    x, target = torch.randn(2, 2, 4, 8, 8, generator=g)
    for _ in range(steps):
        states = family.encode_text(["a blue star", "two"])
        out = family.denoise(x, torch.tensor([10, 700]), Conditioning(states.tokens), torch.zeros(2, 6))
        (out - target).square().mean().backward()
        optimizer.step()
        method.after_step()
        optimizer.zero_grad()


def test_every_method_has_a_case():
    assert {*KINDS.values()} == {*registry.names("methods")}


def test_nothing_changes_before_the_first_step(installed):
    family, method, *_ = installed
    base = output(load())
    assert torch.equal(output(family), base)
    for strength in (0, 0.5):
        with method.at(strength):
            assert torch.equal(output(family), base)


def test_only_its_parameters_train(installed):
    family, method, before, _ = installed
    trainable = {p for part in family.parts.values() for p in part.parameters() if p.requires_grad}
    grouped = [p for group in method.groups(1e-3) for p in group["params"]]
    assert trainable == set(method.parameters().values()) == set(grouped) and len(grouped) == len(trainable)
    assert {p.dtype for p in trainable} == {torch.float32}
    start = {name: p.detach().clone() for name, p in method.parameters().items()}
    train(family, method)
    assert all(not torch.equal(p, start[name]) for name, p in method.parameters().items())
    for part, module in family.parts.items():
        now = {k.replace(".base_layer", ""): v for k, v in module.state_dict().items()}
        assert all(torch.equal(now[name], value) for name, value in before[part].items())


def test_its_names_are_those_of_the_published_layout_and_always_the_same(installed):
    family, method, _, case = installed
    again = build(case)
    again.install(load())
    assert list(method.parameters()) == list(again.parameters())
    assert all(torch.equal(p, again.parameters()[name]) for name, p in method.parameters().items())
    for name in method.parameters():
        part, path = name.rpartition(".")[0].split(".", 1)
        assert families.weight(family.parts, part, path) is not None
        assert part == "denoiser" or path.startswith("text_model.")


def test_restore_and_merge_give_the_trained_model(installed):
    family, method, _, case = installed
    train(family, method)
    trained, artifact = output(family), method.export({"note": "x"})[""]
    assert artifact.kind == method.kind and artifact.metadata == {"note": "x"}

    fresh, again = load(), build(case)
    again.install(fresh)
    again.restore({name: p.detach().clone() for name, p in method.parameters().items()})
    assert torch.equal(output(fresh), trained)

    plain = load()
    base = output(plain)
    for strength in (1.0, 0.5, -0.3):
        with method.at(strength):
            expected = output(family)
        with families.merged(plain.parts, [(artifact, strength)]):
            assert (output(plain) - expected).norm() <= 1e-5 * expected.norm()
            assert (expected - base).norm() > 1e-3 * base.norm()
        assert torch.equal(output(plain), base)       # unmerged bit for bit
    assert torch.equal(output(family), trained)


def test_its_file_is_its_artifact_bit_for_bit(installed, tmp_path):
    family, method, *_ = installed
    train(family, method)
    artifact = method.export({})[""]
    formats.save(artifact, tmp_path / "x.safetensors", "kohya", family.spec)
    back = formats.load(tmp_path / "x.safetensors", family.spec)
    assert back.kind == artifact.kind and back.tensors.keys() == artifact.tensors.keys()
    assert all(torch.equal(back.tensors[name], t) for name, t in artifact.tensors.items())


def test_training_goes_on_from_a_file(installed, tmp_path):
    family, method, _, case = installed
    if method.kind == "difference":
        pytest.skip("the file of an OFT holds what it makes, not its blocks")
    train(family, method)
    formats.save(method.export({})[""], tmp_path / "x.safetensors", "kohya", family.spec)
    fresh, again = load(), build(case)
    again.install(fresh)
    again.start_from(formats.load(tmp_path / "x.safetensors", family.spec))
    assert (output(fresh) - output(family)).norm() <= 1e-6 * output(family).norm()


def test_what_does_not_fit_is_refused_and_nothing_changes(installed):
    family, method, *_ = installed
    artifact = method.export({})[""]
    wrong = {name.replace("attn2", "attn7"): t for name, t in artifact.tensors.items()}
    with pytest.raises(FinetuneError, match="fit"):
        method.restore(wrong)
    with pytest.raises(FinetuneError, match="does not fit the recipe"):
        method.start_from(type(artifact)(artifact.kind, "sd1", wrong, {}))
    plain = load()
    base = output(plain)
    with pytest.raises(FinetuneError, match="no such module"):
        families.merge(plain.parts, [(type(artifact)(artifact.kind, "sd1", wrong, {}), 1.0)])
    assert torch.equal(output(plain), base)
