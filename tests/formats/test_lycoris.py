"""What the files of LyCORIS do to a weight: each formula as the consuming tools have it, written out again in float64."""

import math

import pytest
import torch

from finetune import registry
from finetune.artifact import modules
from finetune.change import change
from finetune.errors import FinetuneError
from finetune.families import base as families
from finetune.formats import base, kohya

SPEC = registry.find("families", "sd1").SPEC
OUT, IN, RANK, ALPHA = 12, 8, 3, 1.7
LINEAR, CONV = (OUT, IN), (OUT, IN, 3, 3)


def draw(*shape):
    return torch.randn(*shape) / 2


def decoded(tensors, module="conv_in"):
    return kohya.decode({f"lora_unet_{module}.{name}": t for name, t in tensors.items()}, {}, SPEC)


def changed(tensors, weight):
    """What this toolkit makes of the file's tensors, in float64."""
    return change(modules(decoded(tensors).tensors)["denoiser", "conv_in"], weight).double()


def close(found, wanted):
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


def outer(t, a, b):
    """Tucker: Σ t_ij a_i b_j over both ranks, for every place of the kernel."""
    return torch.einsum("ijkl,io,jc->ockl", t, a, b)


def lora(shape):
    down, up = draw(RANK, *shape[1:]), draw(OUT, RANK, *[1] * (len(shape) - 2))
    product = torch.einsum("or,r...->o...", up.double().reshape(OUT, RANK), down.double())
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(ALPHA)}, product * ALPHA / RANK


def tucker(shape):
    down, mid, up = draw(RANK, IN, 1, 1), draw(RANK, RANK, 3, 3), draw(OUT, RANK, 1, 1)
    product = outer(mid.double(), up.double()[..., 0, 0].T, down.double()[..., 0, 0])
    return {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(ALPHA)}, \
        product * ALPHA / RANK


def loha(shape):
    inner = math.prod(shape[1:])
    t = {f"hada_w{i}_a": draw(OUT, RANK) for i in (1, 2)} | {f"hada_w{i}_b": draw(RANK, inner) for i in (1, 2)}
    one, two = ((t[f"hada_w{i}_a"].double() @ t[f"hada_w{i}_b"].double()) for i in (1, 2))
    return t | {"alpha": torch.tensor(ALPHA)}, (one * two).reshape(shape) * ALPHA / RANK


def loha_tucker(shape):
    t = {f"hada_w{i}_{side}": draw(RANK, n) for i in (1, 2) for side, n in (("a", OUT), ("b", IN))}
    t |= {"hada_t1": draw(RANK, RANK, 3, 3), "hada_t2": draw(RANK, RANK, 3, 3)}
    one, two = (outer(*(t[name].double() for name in (f"hada_t{i}", f"hada_w{i}_a", f"hada_w{i}_b"))) for i in (1, 2))
    return t | {"alpha": torch.tensor(ALPHA)}, one * two * ALPHA / RANK


def kron(left, right):
    """The Kronecker product on the first two axes, element by element."""
    (a, c), (b, d) = left.shape, right.shape[:2]
    result = torch.zeros(a * b, c * d, *right.shape[2:], dtype=torch.float64)
    for i in range(a):
        for j in range(c):
            result[i * b:(i + 1) * b, j * d:(j + 1) * d] = left[i, j] * right
    return result


def lokr(shape):
    w1, w2 = draw(3, 2), draw(4, 4, *shape[2:])
    # Both whole: every tool ignores the alpha.
    return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(ALPHA)}, kron(w1.double(), w2.double())


def lokr_low_rank(shape):
    t = {"lokr_w1_a": draw(3, 1), "lokr_w1_b": draw(1, 2)}
    t |= {"lokr_w2_a": draw(4, 2), "lokr_w2_b": draw(2, 4 * math.prod(shape[2:]))}
    left, right = (t[f"lokr_w{i}_a"].double() @ t[f"lokr_w{i}_b"].double() for i in (1, 2))
    # The rank that counts is that of w2.
    return t | {"alpha": torch.tensor(ALPHA)}, kron(left, right.reshape(4, 4, *shape[2:])) * ALPHA / 2


def lokr_tucker(shape):
    t = {"lokr_w1": draw(3, 2), "lokr_w2_a": draw(2, 4), "lokr_w2_b": draw(2, 4), "lokr_t2": draw(2, 2, 3, 3)}
    right = outer(*(t[name].double() for name in ("lokr_t2", "lokr_w2_a", "lokr_w2_b")))
    return t | {"alpha": torch.tensor(ALPHA)}, kron(t["lokr_w1"].double(), right) * ALPHA / 2


def difference(shape):
    t = draw(*shape)
    return {"diff": t}, t.double()


BOTH = lora, loha, lokr, lokr_low_rank, difference
ADDED = [(make, shape) for make in BOTH for shape in (LINEAR, CONV)]
ADDED += [(make, CONV) for make in (tucker, loha_tucker, lokr_tucker)]


@pytest.mark.parametrize("make, shape", ADDED)
def test_what_is_added(make, shape):
    tensors, wanted = make(shape)
    close(changed(tensors, draw(*shape)), wanted)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("make, shape", [(lora, LINEAR), (lora, CONV), (loha, CONV), (lokr, LINEAR)])
def test_dora_gives_the_changed_weight_its_lengths(make, shape, rows):
    tensors, added = make(shape)
    weight, kept = draw(*shape), 0 if rows else 1
    scale = draw(*(n if axis == kept else 1 for axis, n in enumerate(shape))).abs() + 0.1
    close(changed(tensors | {"dora_scale": scale}, weight), changed_lengths(weight.double(), added, scale.double(), kept))


def changed_lengths(weight, added, scale, kept):
    whole = (weight + added).transpose(0, kept)
    norm = whole.reshape(whole.shape[0], -1).norm(dim=1).reshape(-1, *[1] * (whole.ndim - 1))
    return (whole / norm).transpose(0, kept) * scale - weight


@pytest.mark.parametrize("shape", [LINEAR, CONV])
def test_oft_turns_blocks_of_rows(shape):
    blocks, weight = draw(3, 4, 4), draw(*shape)
    wanted = torch.zeros(shape, dtype=torch.float64)
    for i, block in enumerate(blocks.double()):
        skew, one, rows = block - block.T, torch.eye(4, dtype=torch.float64), slice(4 * i, 4 * i + 4)
        rotation = (one + skew) @ (one - skew).inverse()
        assert torch.allclose(rotation @ rotation.T, one)
        wanted[rows] = torch.tensordot(rotation.T - one, weight[rows].double(), 1)
    close(changed({"oft_blocks": blocks, "alpha": torch.tensor(0.0)}, weight), wanted)


@pytest.mark.parametrize("make, shape", ADDED)
def test_what_is_read_is_written_and_read_again_bit_for_bit(make, shape, tmp_path):
    """Also with a magnitude; and what is multiplied out stays so."""
    artifact = decoded(make(shape)[0] | {"dora_scale": draw(1, IN, *[1] * (len(shape) - 2))})
    base.save(artifact, tmp_path / "x.safetensors", "kohya", SPEC)
    again = base.load(tmp_path / "x.safetensors", SPEC)
    assert again.kind == "dora" and again.tensors.keys() == artifact.tensors.keys()
    assert all(torch.equal(t, artifact.tensors[name]) for name, t in again.tensors.items())


@pytest.mark.parametrize("make, kind, module", [
    (loha, "loha", "lycoris.kohya"), (lokr, "lokr", "lycoris.kohya"), (difference, "difference", "lycoris.kohya"),
    (tucker, "lora", "networks.lora")])
def test_what_tools_are_told(make, kind, module):
    artifact = decoded(make(CONV)[0])
    tensors, metadata = kohya.encode(artifact, SPEC)
    assert (artifact.kind, metadata["finetune.kind"], metadata["ss_network_module"]) == (kind, kind, module)
    assert ("ss_network_dim" in metadata) == (kind in ("loha", "lora"))
    assert kind == "difference" or "lora_unet_conv_in.alpha" in tensors
    if kind == "lokr":      # whole matrices, which InvokeAI recognises, and the alpha that says the same to every tool
        assert {name.rpartition(".")[2] for name in tensors} == {"lokr_w1", "lokr_w2", "alpha"}
        assert tensors["lora_unet_conv_in.alpha"] == 1


def test_norms_and_biases(tmp_path):
    """As LyCORIS writes them: diff_b of a layer, beside whatever changes its weight, and w_norm and b_norm."""
    parts = {"denoiser": torch.nn.ModuleDict({"conv_in": torch.nn.Conv2d(IN, OUT, 3),
                                              "conv_norm_out": torch.nn.GroupNorm(2, IN)})}
    conv, norm = parts["denoiser"].values()
    file = {f"lora_unet_conv_in.{name}": t for name, t in lora(CONV)[0].items()} | {"lora_unet_conv_in.diff_b": draw(OUT)}
    file |= {"lora_unet_conv_norm_out.w_norm": draw(IN), "lora_unet_conv_norm_out.b_norm": draw(IN)}
    artifact = kohya.decode(file, {}, SPEC)
    again = kohya.encode(artifact, SPEC)[0]
    assert artifact.kind == "difference" and again.keys() == file.keys()
    assert all(torch.equal(again[name], t) for name, t in file.items())
    before = [p.detach().clone() for p in (conv.bias, norm.weight, norm.bias)]
    with families.merged(parts, [(artifact, 0.5)]):
        for p, old, name in zip((conv.bias, norm.weight, norm.bias), before,
                                ("conv_in.diff_b", "conv_norm_out.w_norm", "conv_norm_out.b_norm")):
            torch.testing.assert_close(p, old + 0.5 * file[f"lora_unet_{name}"])
    parts["denoiser"]["conv_in"] = torch.nn.Conv2d(IN, OUT, 3, bias=False)
    assert families.misfits(parts, artifact) == ["denoiser.conv_in.bias: the base has no such module"]
    with pytest.raises(FinetuneError, match="whole differences, of weights, biases and norms, would be lost"):
        base.save(artifact, tmp_path / "x", "diffusers", SPEC)


def test_a_file_may_mix_kinds():
    mixed = {f"lora_unet_conv_in.{name}": t for name, t in loha(CONV)[0].items()}
    mixed |= {f"lora_unet_conv_out.{name}": t for name, t in lora(CONV)[0].items()}
    assert kohya.decode(mixed, {}, SPEC).kind == "loha"


@pytest.mark.parametrize("tensors, said", [
    ({"hada_w1_a": draw(4, 2), "hada_w1_b": draw(2, 4)}, "lacks hada_w2_a, hada_w2_b: the file is incomplete"),
    ({"lokr_w1": draw(2, 2), "lokr_w2_a": draw(2, 2)}, "lacks lokr_w2: the file"),
    ({"alpha": torch.tensor(1.0)}, "has nothing but (alpha|dora_scale): the file is incomplete"),
    ({"dora_scale": draw(1, 4)}, "has nothing but (alpha|dora_scale): the file is incomplete"),
    (lora(LINEAR)[0] | {"diff": draw(4, 4)}, "has diff beside lora_A, lora_B"),
    (lora(LINEAR)[0] | {"dora_scale": draw(4)}, r"dora_scale has the shape \(4,\): of rows or"),
    (loha(LINEAR)[0] | {"hada_w2_b": draw(RANK, 5)}, "do not fit each other"),
    ({"lokr_w1": draw(2), "lokr_w2": draw(2, 2)}, "do not fit each other"),
    ({"oft_blocks": draw(3, 4, 4), "alpha": torch.tensor(0.1)}, "a constrained OFT"),
    ({"oft_blocks": draw(3, 4, 5)}, "do not fit each other"),
    ({"oft_blocks": draw(2, 3, 4, 4)}, "a BOFT, which is not read"),
    ({"diff_b": draw(4)}, "nothing but diff_b: the file is incomplete"),
    (lora(LINEAR)[0] | {"lora_up.weight": torch.ones(OUT, RANK, dtype=torch.int8)}, "lora_B has numbers of the type int8"),
    (tucker(CONV)[0] | {"lora_mid.weight": draw(2, 2, 3, 3)}, "do not fit each other"),
])
def test_what_makes_no_change_is_told(tensors, said):
    with pytest.raises(FinetuneError, match=said):
        decoded(tensors)


def test_diffusers_is_not_given_what_it_cannot_hold(tmp_path):
    for make in (loha, lokr, difference):
        with pytest.raises(FinetuneError, match="diffusers cannot hold adapters of the kind .*; kohya can"):
            base.save(decoded(make(CONV)[0]), tmp_path / "x", "diffusers", SPEC)


def test_what_does_not_fit_the_weight_is_told():
    parts = {"denoiser": torch.nn.ModuleDict({"conv_in": torch.nn.Conv2d(IN, OUT, 3)})}
    for tensors, said in (
            (loha(LINEAR)[0], r"shape \(12, 8\), but the base has \(12, 8, 3, 3\)"),
            ({"oft_blocks": draw(3, 5, 5)}, "3 blocks of 5 rows, but the base has 12 rows"),
            (lora(CONV)[0] | {"dora_scale": draw(1, OUT, 1, 1)}, r"magnitudes of shape \(1, 12, 1, 1\)")):
        assert len(families.misfits(parts, decoded(tensors))) == 1
        with pytest.raises(FinetuneError, match=said):
            families.merge(parts, [(decoded(tensors), 1.0)])
    for tensors in (loha(CONV)[0], {"oft_blocks": draw(3, 4, 4)}, lora(CONV)[0] | {"dora_scale": draw(1, IN, 1, 1)}):
        assert not families.misfits(parts, decoded(tensors))


def test_the_order_of_merged_adapters_does_not_matter():
    parts = {"denoiser": torch.nn.ModuleDict({"conv_in": torch.nn.Conv2d(IN, OUT, 3)})}
    weight = parts["denoiser"]["conv_in"].weight
    adapters = [(decoded(lora(CONV)[0] | {"dora_scale": draw(1, IN, 1, 1)}), 0.5), (decoded(loha(CONV)[0]), 1.0)]
    before, results = weight.detach().clone(), []
    for order in (adapters, adapters[::-1]):
        with families.merged(parts, order):
            results.append(weight.detach().clone())
    assert torch.allclose(*results, atol=1e-6) and not torch.allclose(results[0], before, atol=1e-2)
    assert torch.equal(weight, before)
