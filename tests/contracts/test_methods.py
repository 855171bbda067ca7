"""What every method promises, over the registry and the variants of each, on the tiny base."""

import pytest
import torch
from pydantic import TypeAdapter

from finetune import registry, tokens
from finetune.batch import Conditioning
from finetune.errors import FinetuneError
from finetune.families import _control
from finetune.families import base as families
from finetune.formats import _tokens
from finetune.formats import base as formats
from finetune.methods.base import restore
from finetune.recipe import schema
from finetune.train.together import Together

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
    "full": {},
    "full, of some layers": {"targets": ["*.attn2.to_k", "*.attn2.to_v"], "text": {}},
    "embedding": {"tokens": {"sks-dog": {"init": "red circle"}, "sks-hut": {"init": "a star", "vectors": 3}}},
    "control": {},
    "vae_decoder": {},
    "vae_decoder with the encoder": {"encoder": True},
}
KINDS = {case: case.split()[0].strip(",") for case in CASES} | dict.fromkeys(     # case -> method
    ["lora of two ranks", "rslora", "dora", "loha", "lokr", "oft"], "lora")


SAID = "two sks-dog in a sks-hut"       # to most methods words like any other


def load():
    return registry.find("families", "sd1").load("tiny")


def build(case: str):
    """The method of a case, as a recipe has it."""
    words = TypeAdapter(schema.Method).validate_python({"kind": KINDS[case]} | CASES[case])
    return registry.find("methods", KINDS[case]).build(words, 0)


@pytest.fixture(params=CASES)
def installed(request):
    family, method = load(), build(request.param)
    before = {part: {k: v.clone() for k, v in module.state_dict().items()} for part, module in family.parts.items()}
    method.install(family)
    return family, method, before, request.param


def picture(g: torch.Generator) -> torch.Tensor:
    return torch.rand(1, 3, 16, 16, generator=g) * 2 - 1


def told(family, prompts: list[str]) -> Conditioning:
    """The states of two prompts, and for a control branch something to see."""
    seen = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)) if "control" in family.parts else None
    return Conditioning(family.encode_text(prompts).tokens, control=seen)


def output(family, prompt: str = "a red circle") -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=g)
    with torch.no_grad():
        out = family.denoise(x, torch.tensor([10, 700]), told(family, [prompt, ""]), torch.zeros(2, 6))
        return torch.cat([out.flatten(), family.parts["vae"](picture(g)).sample.flatten()])


def applied(family, artifacts: dict, strength: float):
    """A context in which the family has what is in the files."""
    if all(artifact.kind == "embedding" for artifact in artifacts.values()):
        return tokens.added(family, {name: _tokens.rows(artifact) for name, artifact in artifacts.items()})
    if artifacts[""].kind == "control":
        return _control.added(family, [(artifacts[""].tensors, strength)])
    return families.merged(family.parts, [(artifact, strength) for artifact in artifacts.values()])


def train(family, method, steps: int = 3) -> None:
    """A few optimizer steps on a made-up loss."""
    optimizer = torch.optim.AdamW(method.groups(3e-3))
    g = torch.Generator().manual_seed(1)
    x, target = torch.randn(2, 2, 4, 8, 8, generator=g)
    for _ in range(steps if method.objective == "decode" else 0):
        (family.parts["vae"](picture(g)).sample - 0.5).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for _ in range(steps if method.objective == "denoise" else 0):
        out = family.denoise(x, torch.tensor([10, 700]), told(family, ["a blue star", SAID]), torch.zeros(2, 6))
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
    for part in before:
        module = family.parts[part]
        now = {k.replace(".base_layer", ""): v for k, v in module.state_dict().items()}
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        assert all(torch.equal(now[name], value) for name, value in before[part].items() if name not in trained)


def test_its_names_are_those_of_the_published_layout_and_always_the_same(installed):
    family, method, _, case = installed
    again = build(case)
    again.install(load())
    assert list(method.parameters()) == list(again.parameters())
    assert all(torch.equal(p, again.parameters()[name]) for name, p in method.parameters().items())
    for name in method.parameters() if method.kind != "embedding" else ():      # of each token a file, and a name here
        part, path = name.rpartition(".")[0].split(".", 1)
        assert families.weight(family.parts, part, path) is not None
        assert part != "text" or path.startswith("text_model.")


def test_restore_and_merge_give_the_trained_model(installed):
    family, method, _, case = installed
    train(family, method)
    trained, artifacts = output(family, SAID), method.export({"note": "x"})
    assert {artifact.kind for artifact in artifacts.values()} == {method.kind}
    assert all(artifact.metadata["note"] == "x" for artifact in artifacts.values())

    fresh, again = load(), build(case)
    again.install(fresh)
    restore(again.parameters(), {name: p.detach().clone() for name, p in method.parameters().items()})
    assert torch.equal(output(fresh, SAID), trained)

    plain = load()
    base = output(plain, SAID)
    for strength in (1.0, 0.5, -0.3) if method.kind != "embedding" else (1.0,):
        with method.at(strength):
            expected = output(family, SAID)
        with applied(plain, artifacts, strength):
            assert (output(plain, SAID) - expected).norm() <= 1e-5 * expected.norm()
            assert (expected - base).norm() > 1e-3 * base.norm()
        assert torch.equal(output(plain, SAID), base)       # taken away bit for bit
    assert torch.equal(output(family, SAID), trained)


def test_its_file_is_its_artifact_bit_for_bit(installed, tmp_path):
    family, method, *_ = installed
    if method.kind == "full":
        pytest.skip("a whole model is a folder: see tests/runs")
    train(family, method)
    for artifact in method.export({}).values():
        formats.save(artifact, tmp_path / "x.safetensors", "diffusers" if method.kind == "control" else "kohya", family.spec)
        back = formats.load(tmp_path / "x.safetensors", family.spec)
        assert back.kind == artifact.kind and back.tensors.keys() == artifact.tensors.keys()
        assert all(torch.equal(back.tensors[name], t) for name, t in artifact.tensors.items())


def test_training_goes_on_from_a_file(installed, tmp_path):
    family, method, _, case = installed
    if method.kind == "difference" or not hasattr(method, "start_from"):
        pytest.skip("the file of an OFT holds what it makes, not its blocks; a whole model or VAE can be the base")
    train(family, method)
    formats.save(method.export({})[""], tmp_path / "x.safetensors", "kohya", family.spec)
    fresh, again = load(), build(case)
    again.install(fresh)
    again.start_from(formats.load(tmp_path / "x.safetensors", family.spec))
    assert (output(fresh) - output(family)).norm() <= 1e-6 * output(family).norm()


def test_what_does_not_fit_is_refused_and_nothing_changes(installed):
    family, method, *_ = installed
    train(family, method, 1)
    artifact = next(iter(method.export({}).values()))
    wrong = {name.replace("attn2", "attn7").replace("decoder.", "recoder."): t for name, t in artifact.tensors.items()}
    with pytest.raises(FinetuneError, match="fit"):
        restore(method.parameters(), wrong)
    if hasattr(method, "start_from"):
        with pytest.raises(FinetuneError, match="does not fit the recipe"):
            method.start_from(type(artifact)(artifact.kind, "sd1", wrong, {}))
    plain = load()
    base = output(plain)
    with pytest.raises(FinetuneError, match="no such module|cannot be merged"):
        families.merge(plain.parts, [(type(artifact)(artifact.kind, "sd1", wrong, {}), 1.0)])
    assert torch.equal(output(plain), base)


def test_two_methods_would_be_one_file():
    Together((build("embedding"), build("lora")))
    with pytest.raises(FinetuneError, match="lora and full would both be the run's file"):
        Together((build("lora"), build("embedding"), build("full")))
