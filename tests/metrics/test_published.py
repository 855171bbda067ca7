"""The usual networks as they are published: a folder of safetensors and configs, or the hub's cache of one."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import registry
from finetune.metrics._eye import Network
from finetune.metrics._intervals import facts
from finetune.metrics.base import Painted
from finetune.metrics.fid import frechet
from finetune.metrics.kid import kernel_distance

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# facebook/dinov2-base and facebook/dino-vitb16 have these beside their weights
DINO2 = {"crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
         "do_rescale": True, "do_resize": True, "image_mean": MEAN, "image_std": STD,
         "image_processor_type": "BitImageProcessor",
         "resample": 3, "rescale_factor": 1 / 255, "size": {"shortest_edge": 256}}
DINO = {"do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor", "image_mean": MEAN,
        "image_std": STD, "resample": 2, "size": 224}
# openai/clip-vit-large-patch14
CLIP = {"crop_size": 32, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3,
        "size": 32}


def noisy(seed: int, count: int) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (6, 5, 3), np.uint8)).resize((60, 40)) for _ in range(count)]


@pytest.mark.parametrize("kind, config, seen", [
    ("Dinov2Model", {"image_size": 518, "patch_size": 14}, DINO2), ("ViTModel", {"image_size": 224, "patch_size": 16}, DINO)])
def test_dino_by_its_hub_id(kind, config, seen, tmp_path, monkeypatch):
    import transformers

    folder = tmp_path / "models--facebook--dino" / "snapshots" / "0123"
    sizes = SMALL if kind == "ViTModel" else {key: value for key, value in SMALL.items() if key != "intermediate_size"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = getattr(transformers, kind)(getattr(transformers, kind.replace("Model", "Config"))(**sizes, **config)).eval()
    net.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(seen))
    (folder.parent.parent / "refs").mkdir()
    (folder.parent.parent / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    pictures = noisy(0, 3)
    found = Network("facebook/dino").pictures(pictures)
    side = seen["size"] if kind == "ViTModel" else None        # the processor's work, once more by hand
    resized = [p.resize((side, side), Image.Resampling(seen["resample"])) if side else
               p.resize((384, 256), Image.Resampling(seen["resample"])).crop((80, 16, 304, 240)) for p in pictures]
    x = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 for p in resized])
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        assert found == pytest.approx(net(x).last_hidden_state[:, 0].double().numpy(), abs=1e-5)
    dino = registry.find("metrics", "dino").measure(Painted([], pictures, noisy(1, 2)), Network("facebook/dino"))["dino"]
    assert 0 < facts(dino)["value"] < 1


def test_clip_t_is_that_of_torchmetrics(clip, tmp_path):
    """By torchmetrics' own processing of the pictures and words; transformers 5 wraps features, which it does not know."""
    CLIPScore = pytest.importorskip("torchmetrics.multimodal.clip_score").CLIPScore
    import transformers

    class Unwrapped(transformers.CLIPModel):
        def get_image_features(self, *inputs, **more):
            return super().get_image_features(*inputs, **more).pooler_output

        def get_text_features(self, *inputs, **more):
            return super().get_text_features(*inputs, **more).pooler_output

    folder = shutil.copytree(clip, tmp_path / "clip")
    (folder / "preprocessor_config.json").write_text(json.dumps(CLIP))
    pictures, texts = noisy(0, 4), ["a red circle", "a blue star", "a red circle on white", "a"]
    score = CLIPScore(lambda: (Unwrapped.from_pretrained(folder), transformers.CLIPProcessor.from_pretrained(folder)))
    score.update([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures], texts)
    wanted = (score.score / score.n_samples / 100).item()      # `compute` has it no less than 0, where this net is
    found = registry.find("metrics", "clip_t").measure(Painted(texts, pictures), Network(str(folder)))["clip_t"]
    assert facts(found)["value"] == pytest.approx(wanted, abs=1e-5)


def test_distances_of_sets_are_those_of_torchmetrics():
    of = pytest.importorskip("torchmetrics.image.fid")
    from torchmetrics.image.kid import KernelInceptionDistance

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 8)), rng.normal(0.3, 1.2, size=(80, 8))

    class Known(torch.nn.Module):       # a picture stands for its own features
        num_features = 8

        def forward(self, pictures):
            return pictures[:, 0, 0]

    fid = of.FrechetInceptionDistance(Known(), normalize=True, input_img_size=(1, 1, 8)).set_dtype(torch.float64)
    for rows, real in ((x, False), (y, True)):
        fid.update(torch.from_numpy(rows)[:, None, None], real=real)
    assert frechet(x, y) == pytest.approx(fid.compute().item(), abs=1e-5)
    kid = KernelInceptionDistance(Known(), subsets=1, subset_size=60, normalize=True)
    for rows, real in ((x, False), (y[:60], True)):
        kid.update(torch.from_numpy(rows)[:, None, None], real=real)
    assert facts(kernel_distance(x, y[:60]))["value"] == pytest.approx(kid.compute()[0].item(), abs=1e-5)
