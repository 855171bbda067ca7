"""Each metric on pictures of which the truth is known."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import nn

from finetune import registry
from finetune.errors import FinetuneError
from finetune.metrics._eye import Network, Pixels
from finetune.metrics._intervals import facts
from finetune.metrics.attributes import Reader
from finetune.metrics.base import Painted
from finetune.metrics.fid import frechet
from finetune.metrics.kid import kernel_distance

COLOURS = ["red", "blue", "green", "yellow"]


def drawn(seed: int, colour: str = "") -> Image.Image:
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (48, 48), tuple(int(v) for v in rng.integers(150, 255, 3)))
    pen = ImageDraw.Draw(picture)
    for _ in range(4):
        x, y = rng.integers(0, 32, 2).tolist()
        pen.ellipse([x, y, x + 14, y + 14], colour or COLOURS[int(rng.integers(4))])
    return picture


def several(first: int, count: int) -> list[Image.Image]:
    return [drawn(seed) for seed in range(first, first + count)]


def measured(name: str, painted: Painted, eye) -> dict[str, dict]:
    return {key: facts(one) for key, one in registry.find("metrics", name).measure(painted, eye).items()}


@pytest.fixture(scope="module")
def eye(clip):
    return Network(clip)


def test_features_are_those_of_transformers(clip, eye):
    import transformers

    model = transformers.CLIPModel.from_pretrained(clip)
    pictures, texts = several(0, 3), ["a red circle", "a blue star", "a red circle"]
    inputs = transformers.CLIPTokenizer.from_pretrained(clip)(texts, padding=True, return_tensors="pt")
    processor = transformers.AutoImageProcessor.from_pretrained(clip, backend="pil")
    inputs["pixel_values"] = processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = model(**inputs).logits_per_image.diag() / model.logit_scale.exp()
    found = registry.find("metrics", "clip_t").measure(Painted(texts, pictures), eye)["clip_t"]
    assert [found.of(np.eye(3)[i:i + 1])[0] for i in range(3)] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_a_text_that_is_too_long_is_refused(eye):
    with pytest.raises(FinetuneError, match="77 tokens at the most"):
        eye.texts(["red " * 100])


def test_a_network_without_its_weights_is_refused(clip, tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes(open(f"{clip}/{name}", "rb").read())
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(FinetuneError, match="of its tensors are missing"):
        Network(str(tmp_path))
    with pytest.raises(FinetuneError, match="cannot be used"):
        Network(str(tmp_path / "nowhere"))
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FinetuneError, match="its quantization_config chooses code"):
        Network(str(tmp_path))


def test_sets_of_the_same_kind_have_no_distance_and_others_have(eye):
    x, y, other = map(eye.pictures, (several(0, 60), several(100, 60), [drawn(seed, "black") for seed in range(60)]))
    same, far = facts(kernel_distance(x, y)), facts(kernel_distance(other, y))
    assert same["low"] <= 0 <= same["high"] and far["low"] > 0 and far["value"] > 10 * abs(same["value"])
    assert -far["value"] / 10 < facts(kernel_distance(x, x))["value"] <= 0      # unbiased for sets drawn apart
    assert frechet(x, x) == pytest.approx(0, abs=1e-6) and frechet(other, y) > 5 * frechet(x, y)


def test_distances_of_sets_by_their_definitions():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3)), rng.normal(0.5, 2, size=(30, 3))
    k = lambda a, b: (a @ b / 3 + 1) ** 3        # noqa: E731
    wanted = (np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
              + np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
              - 2 * np.mean([k(a, b) for a in x for b in y]))
    assert facts(kernel_distance(x, y))["value"] == pytest.approx(wanted)
    values = np.linalg.eigvals(np.cov(x.T) @ np.cov(y.T))
    wanted = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(np.cov(x.T) + np.cov(y.T)) - 2 * np.sqrt(values.real).sum()
    assert frechet(x, y) == pytest.approx(wanted)


@pytest.mark.parametrize("look", ["clip", "pixels"])
def test_a_copied_training_picture_is_found(look, eye):
    learned = several(0, 12)
    copy = learned[7].resize((96, 96)).resize((44, 44))
    painted = Painted(["a"] * 4, [drawn(50), copy, drawn(51), drawn(52)], learned)
    found = registry.find("metrics", "copying").measure(painted, eye if look == "clip" else Pixels())
    assert facts(found["copies"])["value"] == 0.25
    picture, training, cosine, bits = found["copies"].nearest[0]
    assert (picture, training) == (1, 7) and cosine > 0.9 and bits <= 6


def test_what_is_equal_is_nearest_and_has_not_drifted(eye):
    a, b = several(0, 4), several(20, 4)
    assert measured("drift", Painted([], [], plain=a, base=list(a)), eye)["drift"] == {"value": 0, "low": 0, "high": 0}
    assert measured("drift", Painted([], [], plain=a, base=b), eye)["drift"]["low"] > 0
    for name in ("clip_i", "dino"):
        assert measured(name, Painted([], a[:1] * 3, a[:1]), eye)[name]["value"] == pytest.approx(1)
        assert measured(name, Painted([], b, a[:1]), eye)[name]["value"] < 1


def test_diversity_is_within_a_prompt(eye):
    (a, b), prompts = several(0, 2), ["p", "p", "q", "q"]
    assert measured("diversity", Painted(prompts, [a, a, b, b]), eye)["diversity"]["value"] == pytest.approx(0, abs=1e-9)
    assert measured("diversity", Painted(prompts, [a, b, a, b]), eye)["diversity"]["value"] > 1e-4


@pytest.fixture
def reader(tmp_path) -> str:
    """Random convolutions, and a head that is solved for what they make of four plain colours."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()).eval()
    plain = np.stack([np.array(Image.new("RGB", (16, 16), colour)) for colour in COLOURS])
    h = body(torch.from_numpy(plain).permute(0, 3, 1, 2) / 255 - 0.5)
    h = torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1).detach()
    state = {f"body.{name}": tensor for name, tensor in body.state_dict().items()}
    state |= {"heads.colour.weight": (torch.linalg.pinv(h) @ torch.eye(4)).T.contiguous(), "heads.colour.bias": torch.zeros(4)}
    path = tmp_path / "reader.safetensors"
    save_file(state, path, {"reader": json.dumps({"size": 16, "strides": [2], "heads": {"colour": COLOURS}})})
    return str(path)


def test_attributes(reader, tmp_path):
    pictures = [Image.new("RGB", (32, 32), colour) for colour in COLOURS]
    prompts = ["a red wall", "a blue wall", "a red wall", "yellow or blue"]        # right, right, wrong, not asked
    found = measured("attributes", Painted(prompts, pictures), Reader(reader))
    assert found["colour_right"]["value"] == pytest.approx(2 / 3)
    with pytest.raises(FinetuneError, match="no prompt has exactly one of its words, such as red"):
        registry.find("metrics", "attributes").check(["a wall", "yellow or blue"], Reader(reader))
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(FinetuneError, match="is no classifier that this metric reads"):
        Reader(str(tmp_path / "other.safetensors"))
