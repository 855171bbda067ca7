"""What every method promises, over the registry, on the tiny base."""

import pytest
import torch

from finetune import registry
from finetune.batch import Conditioning
from finetune.errors import FinetuneError
from finetune.families import base as families

FIELDS = {"lora": dict(rank=2, alpha=3.0, dropout=0.0, targets=["all"], learning_rate=None, seed=0)}


@pytest.fixture(params=registry.names("methods"))
def installed(request):
    family = registry.find("families", "sd1").load("tiny")
    method = registry.find("methods", request.param).build(**FIELDS[request.param])
    before = {part: {k: v.clone() for k, v in module.state_dict().items()} for part, module in family.parts.items()}
    method.install(family)
    return family, method, before


def output(family) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    x, tokens = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 77, 128, generator=g)
    with torch.no_grad():
        return family.denoise(x, torch.tensor([10, 700]), Conditioning(tokens), torch.zeros(2, 6))


def step(family, method) -> None:
    """One optimizer step on a made-up loss."""
    optimizer = torch.optim.AdamW(method.groups(), lr=1e-2)
    g = torch.Generator().manual_seed(1)
    x, tokens = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 77, 128, generator=g)
    for _ in range(2):
        family.denoise(x, torch.tensor([10, 700]), Conditioning(tokens), torch.zeros(2, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_nothing_changes_before_the_first_step(installed):
    family, method, _ = installed
    with method.at(0):
        base = output(family)
    assert torch.equal(output(family), base)


def test_only_its_parameters_train(installed):
    family, method, before = installed
    trainable = {p for part in family.parts.values() for p in part.parameters() if p.requires_grad}
    assert trainable == set(method.parameters().values()) == {p for group in method.groups() for p in group["params"]}
    start = {name: p.detach().clone() for name, p in method.parameters().items()}
    step(family, method)
    assert all(not torch.equal(p, start[name]) for name, p in method.parameters().items())
    for part, module in family.parts.items():
        now = {k.replace(".base_layer", ""): v for k, v in module.state_dict().items()}
        assert all(torch.equal(now[name], value) for name, value in before[part].items())


def test_export_restore_and_merge_give_the_trained_model(installed):
    family, method, _ = installed
    step(family, method)
    trained, artifact = output(family), method.export({"note": "x"})
    name = artifact.kind

    fresh = registry.find("families", "sd1").load("tiny")
    again = registry.find("methods", name).build(**FIELDS[name])
    again.install(fresh)
    again.restore({k: v for k, v in artifact.tensors.items() if k in again.parameters()})
    assert torch.equal(output(fresh), trained)

    plain = registry.find("families", "sd1").load("tiny")
    base = output(plain)
    with families.merged(plain.parts, [(artifact, 1.0)]):
        assert (output(plain) - trained).norm() <= 1e-5 * trained.norm()
        assert (trained - base).norm() > 1e-3 * base.norm()
    assert torch.equal(output(plain), base)       # unmerged bit for bit


def test_what_does_not_fit_is_refused_and_nothing_changes(installed):
    family, method, _ = installed
    artifact = method.export({})
    wrong = {name.replace("attn2", "attn7"): t for name, t in artifact.tensors.items()}
    with pytest.raises(FinetuneError, match="fit"):
        method.restore(wrong)
    plain = registry.find("families", "sd1").load("tiny")
    base = output(plain)
    with pytest.raises(FinetuneError, match="no such module"):
        families.merge(plain.parts, [(type(artifact)(artifact.kind, "sd1", wrong, {}), 1.0)])
    assert torch.equal(output(plain), base)
