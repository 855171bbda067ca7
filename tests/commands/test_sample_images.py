"""`finetune sample --image … --mask …`, and what the pictures say of themselves."""

import inspect
import json
import re

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from finetune import registry
from finetune.cli import main
from finetune.families._source import TINY, kind_of, locate
from finetune.train import sampling
from finetune.train.jobs import Job

STEPS = 4


@pytest.fixture(scope="module")
def family():
    return registry.find("families", "sd1").load("tiny")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A red circle, and a mask of the right half."""
    folder = tmp_path_factory.mktemp("images")
    circle, mask = Image.new("RGB", (64, 64), "white"), Image.new("L", (64, 64))
    ImageDraw.Draw(circle).ellipse([12, 12, 52, 52], fill="red")
    ImageDraw.Draw(mask).rectangle([32, 0, 64, 64], fill=255)
    circle.save(folder / "circle.png")
    mask.save(folder / "mask.png")
    return {"image": folder / "circle.png", "mask": folder / "mask.png"}


def sample(out, *arguments) -> int:
    return main(["sample", "--base", "tiny", "--steps", str(STEPS), "--quiet", "--out", str(out), *map(str, arguments)])


def pixels(path) -> np.ndarray:
    return np.asarray(path if isinstance(path, Image.Image) else Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize("pipeline, words", [
    (diffusers.StableDiffusionPipeline, ()), (diffusers.StableDiffusionImg2ImgPipeline, ("image",)),
    (diffusers.StableDiffusionInpaintPipeline, ("image", "mask"))], ids=["text", "image", "inpaint"])
def test_a_verb_is_the_pipeline_of_diffusers(family, files, pipeline, words):
    """Bit for bit on the CPU; and a batch changes no more than rounding does."""
    given = {word: files[word] for word in words} | ({"strength": 0.75} if words else {})
    many = [Job(prompt="a blue star", negative="red", seed=seed, steps=STEPS, size=(64, 64), **given) for seed in (5, 6, 7)]
    own = family.pipeline()
    one, batch = (list(sampling.generate(own, many, size)) for size in (1, 3))
    theirs = pipeline.from_pretrained(TINY, dtype=torch.float32, safety_checker=None)
    options = {{"mask": "mask_image"}.get(word, word): Image.open(files[word]) for word in words}
    wanted = theirs("a blue star", negative_prompt="red", generator=torch.Generator().manual_seed(6),
                    num_inference_steps=STEPS,
                    guidance_scale=5.0, **options, **({"strength": 0.75} if words else {})).images[0]
    assert one[1].tobytes() == wanted.tobytes()
    assert all(np.abs(pixels(a) - pixels(b)).max() <= 1 for a, b in zip(one, batch))
    assert all(part is getattr(own, name) for name, part in sampling.over(own, many[0]).components.items() if part is not None)


def test_a_base_of_nine_channels_paints_inside_masks_alone(family, files, monkeypatch):
    torch.manual_seed(0)
    wide = diffusers.UNet2DConditionModel.from_config({**family.parts["denoiser"].config, "in_channels": 9}).eval()
    monkeypatch.setitem(family.parts, "denoiser", wide)
    job, *refused = (Job(prompt="a blue star", seed=5, steps=2, **given) for given in
                     (files, {}, {"image": files["image"]}))
    own = family.pipeline()
    theirs = diffusers.StableDiffusionInpaintPipeline(**own.components, requires_safety_checker=False)
    wanted = theirs("a blue star", Image.open(files["image"]), Image.open(files["mask"]), num_inference_steps=2,
                    guidance_scale=5.0, generator=torch.Generator().manual_seed(5)).images[0]
    settled = sampling.settle(family, [job])
    assert settled[0].size == (64, 64)
    assert next(sampling.generate(own, settled)).tobytes() == wanted.tobytes()
    for wrong in refused:
        with pytest.raises(sampling.FinetuneError, match="made for inpainting"):
            sampling.settle(family, [wrong])


def test_strength_is_how_much_changes_and_outside_the_mask_nothing_does(files, tmp_path, family):
    rows = [{"prompt": "a blue star", "strength": s, "steps": 10} for s in (0.2, 0.6, 1)]
    rows += [{"prompt": "a blue star", "mask": str(files["mask"]), "steps": 10}]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert sample(tmp_path / "out", "--prompts", tmp_path / "jobs.jsonl", "--image", files["image"]) == 0
    image, *changed, painted = map(pixels, [files["image"], *sorted((tmp_path / "out").iterdir())])
    distances = [np.abs(other - image).mean() for other in changed]
    assert distances == sorted(distances) and distances[2] > 2 * distances[0]
    moments = family.moments(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1)
    vae, latents = family.parts["vae"], family.latents(moments, torch.zeros(1, 4, 16, 16))
    again = vae.decode(latents / vae.config.scaling_factor).sample[0].permute(1, 2, 0).numpy()
    loss = np.abs((again.clip(-1, 1) + 1) * 127.5 - image)[:, :24].mean()       # what the VAE alone does to it
    assert np.abs(painted - image)[:, :24].mean() < 2 * loss and np.abs(painted - image)[:, 32:].mean() > 5 * loss


def test_a_folder_of_images_each_with_its_mask_in_its_own_shape(files, tmp_path):
    """Files as people have them: turned by EXIF, with transparency, larger than the base, no multiple of eight."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir(), masks.mkdir()
    sideways = Image.new("RGB", (200, 100), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways.save(images / "a.jpg", exif=exif)
    Image.new("RGBA", (50, 43), (0, 0, 255, 128)).save(images / "ünd $(b); '.png")
    Image.new("L", (100, 200), 255).save(masks / "a.png")
    Image.new("L", (50, 43), 255).save(masks / "ünd $(b); '.png")
    assert sample(tmp_path / "out", "--prompt", "a blue star", "--prompt", "../../x\n/", "--image", images, "--mask", masks,
                  "--grid", tmp_path / "grid.png") == 0
    found = [Image.open(path) for path in sorted((tmp_path / "out").iterdir())]
    assert [image.size for image in found] == [(40, 88), (48, 40)] * 2
    assert json.loads(found[1].text["finetune"])["image"] == "ünd $(b); '.png"
    (masks / "a.png").unlink()
    assert sample(tmp_path / "none", "--prompt", "x", "--image", images, "--mask", masks) == 2
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("mask, said", [(Image.new("L", (64, 64)), "nothing in the mask is white"),
                                        (Image.new("L", (64, 32), 255), "make them the same")])
def test_masks_that_cannot_be_meant(files, tmp_path, capsys, mask, said):
    mask.save(tmp_path / "mask.png")
    assert sample(tmp_path / "out", "--prompt", "x", "--image", files["image"], "--mask", tmp_path / "mask.png") == 2
    assert said in capsys.readouterr().err


def test_what_a_picture_says_of_itself(files, tmp_path):
    words = ["--negative", "ugly, grey: all", "--image", files["image"], "--strength", 0.5, "--guidance", 1,
             "--scheduler", "EulerAncestralDiscreteScheduler"]
    assert sample(tmp_path, "--prompt", "größe 猫, a \"blue\" star", "--seed", 2**63 - 1, *words) == 0
    path, = tmp_path.iterdir()
    text = Image.open(path).text
    prompt, negative, line = text["parameters"].split("\n")
    assert prompt == "größe 猫, a \"blue\" star" and negative == "Negative prompt: ugly, grey: all"
    values = dict(re.findall(r'(\w[\w ]+): ("(?:\\.|[^"])+"|[^,]*)(?:, |$)', line))
    assert values | {"Version": ""} == {
        "Steps": "4", "Sampler": "Euler a", "CFG scale": "1.0", "Seed": str(2**63 - 1), "Size": "64x64", "Model": "tiny",
        "RNG": "CPU", "Denoising strength": "0.5", "Version": ""}
    facts = json.loads(text["finetune"])
    assert facts["image"] == "circle.png" and facts["strength"] == 0.5 and facts["prompt"] == prompt
    assert str(tmp_path) not in str(text) and str(files["image"].parent) not in str(text)


def test_pictures_are_not_replaced_unasked(tmp_path, capsys):
    assert sample(tmp_path, "--prompt", "a red circle") == 0
    path, = tmp_path.iterdir()
    before = path.read_bytes()
    assert sample(tmp_path, "--prompt", "a blue star", "--count", 2) == 2
    assert "there already" in capsys.readouterr().err and path.read_bytes() == before
    assert sample(tmp_path, "--prompt", "a blue star", "--overwrite") == 0
    assert path.read_bytes() != before and capsys.readouterr() == ("", "")
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize("name, verbs", [("sd21", ("text", "image", "inpaint")), ("sdxl", ("text", "image", "inpaint")),
                                         ("sd3-medium", ("text", "image", "inpaint")),
                                         ("sd35-medium", ("text", "image", "inpaint")),
                                         ("sd15-inpainting", ("inpaint",)), ("sd2-inpainting", ("inpaint",)),
                                         ("sdxl-inpainting", ("inpaint",)), ("x4-upscaler", ("upscale",))])
def test_every_family_paints_what_the_plain_pipeline_paints(name, verbs, member, files, tmp_path):
    base, family = str(member(name)), kind_of(locate(str(member(name))))
    start = {"sdxl": "StableDiffusionXL", "sd3": "StableDiffusion3"}.get(family, "StableDiffusion")
    given = {"image": Image.open(files["image"]), "mask_image": Image.open(files["mask"])}
    for verb in verbs:
        order, words = {"text": ([], ()), "image": (["--image", "--strength", "0.75"], ("image",)),
                        "inpaint": (["--image", "--mask", "--strength", "0.75"], ("image", "mask_image")),
                        "upscale": (["--image", "--upscale"], ("image",))}[verb]
        order = [part for word in order for part in (word, *([str(files[word[2:]])] if word[2:] in files else []))]
        options = {word: given[word] for word in words} | ({"strength": 0.75} if "--strength" in order else {})
        if verb != "upscale":
            order, options = [*order, "--size", "64x64"], options | {"height": 64, "width": 64}
        assert main(["sample", "--base", base, "--family", family, "--prompt", "a blue star", "--negative", "red",
                     "--seed", "6",
                     "--guidance", "3", "--steps", "3", *order, "--quiet", "--out", str(tmp_path / verb)]) == 0
        ending = {"text": "", "image": "Img2Img", "inpaint": "Inpaint", "upscale": "Upscale"}[verb]
        without = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3-medium" else {}
        plain = getattr(diffusers, f"{start}{ending}Pipeline").from_pretrained(base, dtype=torch.float32, **without)
        if "height" not in inspect.signature(plain.__call__).parameters:
            options = {word: value for word, value in options.items() if word not in ("height", "width")}
        wanted = plain("a blue star", negative_prompt="red", generator=torch.Generator().manual_seed(6), num_inference_steps=3,
                       guidance_scale=3.0, **options).images[0]
        assert np.abs(pixels(next((tmp_path / verb).iterdir())) - pixels(wanted)).max() <= 1, verb
