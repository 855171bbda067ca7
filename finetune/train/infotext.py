"""What a sampled PNG says of itself: all of it as JSON under `finetune`, and under `parameters` the text that AUTOMATIC1111's
web UI writes and that most programs read (modules/infotext_utils.py there). No private path is in either."""

import json

from PIL.PngImagePlugin import PngInfo

SAMPLERS = {    # of the web UI, where diffusers has the same
    "DDIM": "DDIM", "PNDM": "PLMS", "EulerDiscrete": "Euler", "EulerAncestralDiscrete": "Euler a", "HeunDiscrete": "Heun",
    "LMSDiscrete": "LMS", "KDPM2Discrete": "DPM2", "KDPM2AncestralDiscrete": "DPM2 a", "DPMSolverMultistep": "DPM++ 2M",
    "DPMSolverSDE": "DPM++ SDE", "UniPCMultistep": "UniPC", "LCM": "LCM"}


def png_info(facts: dict, loras: dict[str, float]) -> PngInfo:
    """`facts` are those of a job, with `base`, `parts`, `clip_skip`, `scheduler` and `version`; `loras` has name and strength
    of those that are on."""
    info = PngInfo()
    info.add_itxt("parameters", infotext(facts, loras))
    info.add_itxt("finetune", json.dumps(facts, ensure_ascii=False))
    return info


def infotext(facts: dict, loras: dict[str, float]) -> str:
    """The prompt with `<lora:name:strength>` for each, the negative prompt, and one line of `Name: value`."""
    scheduler = facts["scheduler"].removesuffix("Scheduler")
    line = {"Steps": facts["steps"], "Sampler": SAMPLERS.get(scheduler, scheduler), "CFG scale": facts["guidance"],
            "Seed": facts["seed"], "Size": facts["size"], "Model": facts["base"], "RNG": "CPU",
            "Version": f"finetune {facts['version']}"}
    if "vae" in facts["parts"]:
        line["VAE"] = facts["parts"]["vae"]
    if facts["clip_skip"] > 1:
        line["Clip skip"] = facts["clip_skip"]
    if "strength" in facts:
        line["Denoising strength"] = facts["strength"]
    negative = [f"Negative prompt: {facts['negative']}"] if facts["negative"] else []
    prompt = " ".join([facts["prompt"], *(f"<lora:{name}:{strength:g}>" for name, strength in loras.items())])
    words = {name: json.dumps(str(value), ensure_ascii=False) if any(sign in str(value) for sign in ",\n:") else value
             for name, value in line.items()}
    return "\n".join([prompt, *negative, ", ".join(f"{name}: {value}" for name, value in words.items())])
