"""What the variants of LoRA do beside what every method does, on the tiny base."""

import pytest
import torch

from finetune import registry
from finetune.artifact import Artifact, modules
from finetune.batch import Conditioning
from finetune.change import core, lengths
from finetune.errors import FinetuneError
from finetune.families.base import merged
from finetune.methods import lora
from finetune.methods._variants import tensor
from finetune.recipe import schema
from finetune.train.recompute import recompute

VARIANTS = ["lora", "rslora", "dora", "loha", "lokr", "oft"]
FIRST = "denoiser.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def installed(dtype=torch.float32, seed=0, **fields):
    family = registry.find("families", "sd1").load("tiny", dtype)
    method = lora.build(schema.Lora(kind="lora", **fields), seed)
    method.install(family)
    return family, method


def shaken(method, size=0.02):
    """As after training: every tensor moved at random."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in method.parameters().values():
            p.add_(size * torch.randn(p.shape, generator=g))
    return method


def output(family):
    g = torch.Generator().manual_seed(0)
    x, tokens = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 77, 128, generator=g)
    return family.denoise(x, torch.tensor([10, 700]), Conditioning(tokens), torch.zeros(2, 6))


def gradients(family, method):
    torch.manual_seed(5)
    output(family).square().mean().backward()
    found = {name: p.grad.clone() for name, p in method.parameters().items()}
    for p in method.parameters().values():
        p.grad = None
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_start_depends_on_the_seed_and_disturbs_no_other_random_number(variant):
    torch.manual_seed(11)
    one = installed(variant=variant, targets=["to_k"])[1].parameters()
    drawn = torch.rand(1)
    torch.manual_seed(11)
    assert torch.equal(drawn, torch.rand(1))
    other = installed(variant=variant, targets=["to_k"], seed=1)[1].parameters()
    assert all(torch.equal(p, other[name]) for name, p in one.items()) == (variant == "oft")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_base_in_bfloat16_starts_exactly_and_merges_to_what_it_rounds_to(variant):
    plain = registry.find("families", "sd1").load("tiny", torch.bfloat16)
    family, method = installed(torch.bfloat16, variant=variant, targets=["all", "conv"])
    with torch.no_grad():
        assert torch.equal(output(family), output(plain))
        with torch.autocast("cpu", torch.bfloat16):
            start, base = output(family), output(plain)
        assert torch.equal(start, base)
        shaken(method)
        with merged(plain.parts, [(method.export({})[""], 1.0)]):
            assert (output(family) - output(plain)).norm() <= 3e-2 * output(plain).norm()
    assert all(p.dtype == torch.float32 for p in method.parameters().values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_changes_no_gradient(variant):
    """Also when layers and ranks are dropped: the second pass drops the same."""
    drops = {"module_dropout": 0.3} | ({} if variant == "oft" else {"rank_dropout": 0.3})
    found = []
    for checkpointing in (False, True, "selective"):
        family, method = installed(variant=variant, targets=["all", "conv"], **drops)
        shaken(method)
        family.parts["denoiser"].train()
        if checkpointing:
            recompute(family.parts["denoiser"], checkpointing)
        found.append(gradients(family, method))
    assert all(torch.equal(grad, twice[name]) for twice in found[1:] for name, grad in found[0].items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dropped_layer_is_the_base_and_nothing_is_dropped_when_not_training(variant):
    family, method = installed(variant=variant, targets=["all"], module_dropout=0.999999)
    with torch.no_grad():
        base = output(family)
        shaken(method)
        rested = output(family)
        family.parts["denoiser"].train()
        dropped = output(family)
        method.words = method.words.model_copy(update={"module_dropout": 0.0})
        kept = output(family)
    assert torch.equal(dropped, base) and torch.equal(kept, rested) and not torch.equal(rested, base)


@pytest.mark.parametrize("variant", ["lora", "loha", "lokr"])
def test_rank_dropout_keeps_the_mean(variant):
    family, method = installed(variant=variant, targets=[FIRST.partition(".")[2]], rank_dropout=0.25)
    layer, x = shaken(method, 0.3).layers[FIRST], torch.randn(5, 128)
    with torch.no_grad():
        base, rested = layer.base_layer(x), layer(x)
        torch.manual_seed(0)
        layer.train()
        seen = torch.stack([layer(x) for _ in range(4000)])
    assert seen.std(0).max() > 0.01
    assert (seen.mean(0) - rested).norm() < 0.05 * (rested - base).norm()


def test_dora_is_the_paper():
    """Equation 5 per column, and §4.3: the norm is a constant for the gradient."""
    for path in (FIRST, "denoiser.down_blocks.0.resnets.0.conv1"):
        family, method = installed(variant="dora", targets=[path.partition(".")[2]], rank=4, alpha=6.0)
        layer = shaken(method, 0.3).layers[path]
        module = {role: tensor(layer, role) for role in ("lora_A", "lora_B")} | {"alpha": torch.tensor(6.0)}
        base, magnitude = layer.base_layer, layer.dora_scale
        x = torch.randn(2, *([base.in_channels, 8, 8] if "conv" in path else [5, base.in_features]))

        whole = base.weight + core(module).reshape(base.weight.shape)
        weight = magnitude * whole / lengths(whole).detach()
        own = torch.nn.functional.conv2d(x, weight, base.bias, padding=1) if "conv" in path else x @ weight.T
        trained = [*method.parameters().values()]
        wanted = torch.autograd.grad(own.square().sum(), trained)
        found = torch.autograd.grad(layer(x).square().sum(), trained)
        torch.testing.assert_close(layer(x), own, rtol=1e-4, atol=1e-4)
        for one, other in zip(found, wanted):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        assert magnitude.shape == ((1, base.in_channels, 1, 1) if "conv" in path else (1, base.in_features))


def test_scales():
    """alpha / rank, with the rank's root for rsLoRA; without an alpha 1, or the root."""
    for variant, alpha, rank, scale in (("lora", 4.0, 16, 0.25), ("rslora", 4.0, 16, 1.0), ("lora", None, 9, 1.0),
                                        ("rslora", None, 9, 3.0), ("dora", 4.0, 16, 0.25), ("loha", 4.0, 16, 0.25)):
        _, method = installed(variant=variant, rank=rank, alpha=alpha, targets=["to_k"])
        assert method.layers[FIRST].scaling["default"] == pytest.approx(scale)
        assert method.export({})[""].tensors[f"{FIRST}.alpha"].item() == pytest.approx(scale * rank)


def test_ranks_and_alphas_by_pattern():
    _, method = installed(rank=4, alpha=2.0, targets=["attention", "conv"], ranks={"conv": 1, "attn2.to_k": 8},
                          alphas={"conv": 1.0})
    shaken(method)
    adapted = modules(method.export({})[""].tensors)
    ranks = {module["lora_A"].shape[0] for module in adapted.values()}
    assert ranks == {1, 4, 8} and {module["alpha"].item() for module in adapted.values()} == {2.0}
    assert method.layers[FIRST].scaling["default"] == 2.0 / 8
    conv = "down_blocks.0.resnets.0.conv1"
    assert method.layers[f"denoiser.{conv}"].scaling["default"] == 1.0
    trained = {role: tensor(method.layers[f"denoiser.{conv}"], role) for role in ("lora_A", "lora_B")}
    torch.testing.assert_close(core(adapted["denoiser", conv]), core(trained | {"alpha": torch.tensor(1.0)}).detach())


def test_lora_plus_and_the_rates_of_the_text_encoder():
    _, method = installed(lora_plus=16, text={"learning_rate": 1e-5})
    rates = {id(p): group["lr"] for group in method.groups(1e-4) for p in group["params"]}
    for name, p in method.parameters().items():
        base = 1e-5 if name.startswith("text.") else 1e-4
        assert rates[id(p)] == pytest.approx(base * (16 if name.endswith("lora_B") else 1)), name
    assert [group["lr"] for group in installed(learning_rate=3e-4)[1].groups(1e-4)] == [3e-4]


def test_the_text_encoder_learns_through_the_captions():
    family, method = installed(rank=2, text={"rank": 3, "targets": ["fc1"]})
    assert method.trains == ("denoiser", "text")
    shaken(method)
    told = family.encode_text(["a red circle"])
    family.denoise(torch.randn(1, 4, 8, 8), torch.tensor([10]), told, torch.zeros(1, 6)).sum().backward()
    text = {name: p for name, p in method.parameters().items() if name.startswith("text.")}
    assert text and all(p.grad.any() for p in text.values())
    assert all(name.startswith("text.text_model.encoder.layers.") for name in text)


@pytest.mark.parametrize("variant", ["lora", "loha", "lokr"])
def test_max_norm(variant):
    _, method = installed(variant=variant, targets=["to_k", "to_v"], max_norm=1.0)
    shaken(method, 0.3)

    def norms():
        return torch.stack([core(module).norm() for module in modules(method.export({})[""].tensors).values()])

    before = norms()
    limit = before.median().item()
    method.words = method.words.model_copy(update={"max_norm": limit})
    method.after_step()
    torch.testing.assert_close(norms(), before.clamp(max=limit))
    held = {name: p.clone() for name, p in method.parameters().items()}
    method.after_step()
    assert all((p - held[name]).norm() <= 1e-5 * p.norm() for name, p in method.parameters().items())


def test_the_size_of_lokr_and_oft():
    _, method = installed(variant="lokr", targets=["to_k"], factor=4)
    w1, w2 = (tensor(method.layers[FIRST], role) for role in ("lokr_w1", "lokr_w2"))
    assert (w1.shape, w2.shape) == ((4, 4), (16, 32))
    _, method = installed(variant="oft", targets=["to_k", "conv_out"], block=24)
    blocks = {stem: tuple(layer.oft_blocks.shape) for stem, layer in method.layers.items()}
    assert blocks[FIRST] == (4, 16, 16) and blocks["denoiser.conv_out"] == (1, 4, 4)


def test_a_file_with_another_scale_goes_on_as_it_is():
    family, method = installed(rank=4, alpha=2.0)
    artifact = shaken(method).export({})[""]
    fresh, again = installed(rank=4, alpha=8.0)
    again.start_from(artifact)
    with torch.no_grad():
        assert (output(fresh) - output(family)).norm() <= 1e-6 * output(family).norm()
    assert torch.equal(artifact.tensors[f"{FIRST}.lora_B"], method.parameters()[f"{FIRST}.lora_B"])


def test_the_blocks_of_an_oft_make_the_difference_that_is_exported_and_can_be_gone_on_from():
    family, method = installed(variant="oft", targets=["all", "conv"], block=8)
    made = shaken(method, 0.1).export({})[""]
    blocks = {name: p.detach() for name, p in method.parameters().items()}
    artifact = Artifact("oft", "sd1", blocks | {f"{stem}.alpha": torch.tensor(0.0) for stem in method.layers}, {})
    plain = registry.find("families", "sd1").load("tiny")
    results = []
    for one in (made, artifact):
        with torch.no_grad(), merged(plain.parts, [(one, 0.5)]):
            results.append(output(plain))
    torch.testing.assert_close(*results)
    _, again = installed(variant="oft", targets=["all", "conv"], block=8)
    again.start_from(artifact)
    assert all(torch.equal(p, blocks[name]) for name, p in again.parameters().items())
    with pytest.raises(FinetuneError, match="this difference does not fit the recipe's oft"):
        again.start_from(made)


@pytest.mark.parametrize("fields, said", [
    ({"rank": 8}, "32 tensors have another shape in the file: .*ranks and base"),
    ({"rank": 4, "targets": ["attn2.to_k"]}, "of the file are not among what the recipe trains: denoiser"),
    ({"rank": 4, "targets": ["attention"]}, "that the recipe trains are not in the file"),
    ({"variant": "lokr"}, "this lora does not fit the recipe's lokr"),
])
def test_a_file_that_does_not_fit_the_recipe_is_told(fields, said):
    count = len(installed(rank=4)[1].parameters())
    artifact = installed(rank=4)[1].export({})[""]
    with pytest.raises(FinetuneError, match=said.replace("32", str(count))):
        installed(**fields)[1].start_from(artifact)
