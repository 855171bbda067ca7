"""The plan of a recipe: what is counted is what a step allocates, and the levers that it names do what they say."""

import json

import pytest

from finetune.cli import main


def plan(recipe, capsys, *words: str) -> tuple[int, dict]:
    code = main(["plan", str(recipe), "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def test_nothing_is_loaded_and_a_lever_makes_it_fit(recipe, capsys):
    code, found = plan(recipe, capsys, "--vram", "1GB")
    assert code == 0 and found["fits"] and found["smallest"] is None
    assert found["weights"]["denoiser"] > found["weights"]["vae"] and found["peak"] == max(found["phases"].values())
    checkpointing = next(lever for lever in found["levers"] if "checkpointing" in lever["set"])
    room = found["peak"] - checkpointing["saves"] // 2
    code, tight = plan(recipe, capsys, "--vram", f"{room / 2**20:.3f}MB")
    assert code == 0 and not tight["fits"] and tight["smallest"]["peak"] <= tight["room"]
    _, levered = plan(recipe, capsys, *(word for lever in tight["smallest"]["set"] for word in ("--set", lever)))
    assert levered["peak"] == tight["smallest"]["peak"]


def test_what_is_dear_to_compute_is_kept(recipe):
    from finetune.recipe import load
    from finetune.train.plan import needs

    plain, selective, all_twice = (needs(load(recipe, [f"train.gradient_checkpointing={word}", "data.resolution=128"]).recipe)
                                   for word in ("false", "selective", "true"))
    assert plain.flops < selective.flops < all_twice.flops
    assert plain.phases["training"] > selective.phases["training"] > all_twice.phases["training"]


def test_few_bits_are_planned_as_they_are_loaded(recipe):
    from finetune.families import sd1
    from finetune.families._source import Changes
    from finetune.recipe import load
    from finetune.train.plan import needs, size

    need = needs(load(recipe, ["base.quantize=nf4"]).recipe)
    real = sd1.load("tiny", changes=Changes(quantize="nf4")).parts
    assert need.weights == {name: size(part) for name, part in real.items()}


def test_out_of_memory_names_what_the_levers_save(recipe, train, tmp_path, monkeypatch, capsys):
    import torch

    from finetune.train import loop

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(loop, "one_step", full)
    assert train(recipe, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "Tried to allocate" in said and "--set train.gradient_checkpointing=selective\n      saves" in said


def test_what_cannot_be_planned(recipe, capsys):
    assert main(["plan", str(recipe), "--vram", "much"]) == 2
    assert "8GB" in capsys.readouterr().err
    assert main(["plan", str(recipe), "--vram", "1MB"]) == 2
    out = capsys.readouterr().out
    assert "no lever makes it" in out and max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("method", ["{kind: full}", "{kind: vae_decoder}", "{kind: lora, variant: dora, text: {}}",
                                    "{kind: lora, variant: oft}", "{kind: lora, variant: loha}", "{kind: lora, variant: lokr}",
                                    "{kind: embedding, tokens: {sks-dog: {init: circle}}}"])
def test_every_method_can_be_planned(recipe, method):
    from finetune.recipe import load
    from finetune.train.plan import needs

    plain = ["objective={adversarial: {}}"] if "vae" in method else []
    need = needs(load(recipe, [f"method={method}", *plain]).recipe)
    assert need.trained and need.phases["training"] > need.weights["vae" if "vae" in method else "denoiser"]
    released = [*plain, "train.gradient_release=true", "train.clip_norm=null", "train.gradient_accumulation=1"]
    if method == "{kind: full}":
        assert needs(load(recipe, [f"method={method}", *released]).recipe).phases["training"] < need.phases["training"]


@pytest.mark.parametrize("name, family", [("sd15-inpainting", "sd1"), ("sdxl", "sdxl"), ("sd3-medium", "sd3"), ("sd35-medium", "sd3"),
                                          ("x4-upscaler", "upscaler")])
def test_every_family_can_be_planned(recipe, member, name, family):
    from finetune.recipe import load
    from finetune.train.plan import needs

    need = needs(load(recipe, [f"base={{family: {family}, path: {member(name)}}}", "data.resolution=64"]).recipe)
    assert need.phases["training"] > need.weights["denoiser"]
