"""The proof that comes with an adapter: the written file is opened again, and gives what was trained.

The probe is one call of the denoiser at a fixed latent, text and timestep. `expected` is its output with the adapter at
strength 0.5 and 1: from the training model at the end of `train`, from our own merge in `finetune verify`. A LoRA is loaded
by diffusers; what diffusers does not load, other kinds and SD 3's original names, is merged by ourselves and held against the
training model.
Of a control branch, which diffusers loads too, the probe is shown a condition. Of a VAE it is a picture drawn from a fixed
latent, and a whole model is loaded again as a base. Of a learned token it is what the text encoder makes of prompts with it;
diffusers loads the file into an encoder that never saw the token.
"""

import copy
import json
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import StringConstraints
from torch import Tensor, nn

from finetune import registry, tokens
from finetune.artifact import WHOLE, Artifact, modules, weights_of
from finetune.change import core
from finetune.device import spare_memory
from finetune.diffusion import noise
from finetune.errors import FinetuneError
from finetune.families import _control
from finetune.families import base as families
from finetune.families._altered import leave_out
from finetune.families._source import Changes, json_object
from finetune.formats import base as formats
from finetune.formats import _consumers as consumers
from finetune.formats import _tokens, kohya, single_file
from finetune.formats._identify import contradictions
from finetune.header import read_header
from finetune.terminal import folded
from finetune.train.preview import resting
from finetune.train.sampling import worded

STRENGTHS = (0.5, 1.0)
FRACTIONS = (0.1, 0.5)      # of the way to noise, where the probe is
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}   # relative; half formats round every layer
NAME = "verified"
PROMPTS = ("{0}", "a drawing of {0}, a picture with {0} in it")
LONGEST = 100       # times the mean length of a row in the vocabulary; what people share has up to 40 or so


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    found: str


# verify.json: of each file in its folder, by name, the checks.
Proof = dict[Annotated[str, StringConstraints(pattern=r"^[^/\\.][^/\\]*$")], list[Check]]


def verify(path: Path, family, expected: dict[float, Tensor] | None = None) -> list[Check]:
    """Every check of one file on one base. Without `expected`, the probe's outputs with the file merged by ourselves.

    Raises FinetuneError when the file is no adapter, or not one of this family."""
    path = weights_of(path) if weights_of(path).is_file() else path
    if path.is_dir() or expected and single_file.reads(read_header(path)):
        return [reloaded(path, family, expected)]
    artifact, checks = alone(path, family.spec)
    if artifact and (misfits := families.misfits(family.parts, artifact)):
        checks.append(Check("fits the base", False, "; ".join(misfits[:3])))
    if artifact and all(check.passed for check in checks):
        checks += [Check("fits the base", True, "every module"), *loaded(path, artifact, family, expected)]
    return checks + tools(path, family.spec)


def loaded(path: Path, artifact: Artifact, family, expected: dict[float, Tensor] | None) -> list[Check]:
    """What the file does to the base."""
    checks = []
    if artifact.kind == "embedding":
        return prompted(path, artifact, family, expected)
    if said := artifact.metadata.get("finetune.extracted"):     # it is not all of what was trained
        checks.append(Check("extracted", True, said))
        expected = None
    if artifact.kind == "control":
        return by_controlnet(path, artifact, family, expected)
    if artifact.kind == "lora" and not (family.spec.joint and kohya.reads(read_header(path))):
        expected = expected or {s: merged(family, artifact, s) for s in STRENGTHS}
        with warnings.catch_warnings():     # peft remarks that the file comes beside what was trained, and goes again
            warnings.simplefilter("ignore")
            checks += by_diffusers(path, family, expected)
    elif expected:
        checks += [compared(family, f"merged by finetune at {s:g}", merged(family, artifact, s), wanted)
                   for s, wanted in expected.items()]
    if artifact.kind == "vae":
        checks.append(by_itself(artifact, family, expected[1.0] if expected else merged(family, artifact, 1.0)))
    return checks


def alone(path: Path, spec) -> tuple[Artifact | None, list[Check]]:
    """What can be said of a file without its base; no artifact where it contradicts itself.

    Raises FinetuneError when it is no adapter, or none of this family."""
    header = read_header(path)
    if lies := contradictions(header):
        return None, [Check("metadata", False, "; ".join(lies))]
    artifact = formats.load(path, spec)
    return artifact, [Check("metadata", True, "as its tensors"), *numbers(artifact)]


def numbers(artifact: Artifact) -> list[Check]:
    """Whether what it changes is finite, and anything: its tensors or, of an adapter whose own are, each multiplied out."""
    infinite = [name for name, t in artifact.tensors.items() if not t.isfinite().all()]
    plain = bool(infinite) or artifact.kind in (*WHOLE, "embedding")
    looked_at = artifact.tensors.items() if plain else (
        (".".join(stem), core(module)) for stem, module in modules(artifact.tensors).items())
    facts = {name: (bool(t.isfinite().all()), bool(t.any())) for name, t in looked_at}
    infinite, still = ([name for name, own in facts.items() if not own[i]] for i in (0, 1))
    what = "tensors" if plain else "changes"
    found = [Check("finite", not infinite, f"{len(facts) - len(infinite)} of {len(facts)} {what}{_which(infinite)}")]
    if not infinite and artifact.kind not in WHOLE:     # a model may well have a bias of zeros
        moved = not still if plain else len(still) < len(facts)
        found.append(Check("not zero", moved, f"{len(facts) - len(still)} of {len(facts)} {what}{_which(still)}"))
    return found


def _which(names: list[str]) -> str:
    return f"; not {', '.join(names[:3])}{', …' if len(names) > 3 else ''}" if names else ""


def tools(path: Path, spec) -> list[Check]:
    """The tools that load it, and those that do not and why: no verdict, for no file is right everywhere."""
    found = consumers.receipt(read_header(path), spec.name)
    return [Check("tools", True, consumers.table(found))] if found else []


def by_diffusers(path: Path, family, expected: dict[float, Tensor]) -> list[Check]:
    """The probe with the file loaded by diffusers at each strength, against what is expected there."""
    pipeline, denoiser = family.pipeline(draws=False), family.parts["denoiser"]
    checks = []
    try:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=NAME)
        for strength, wanted in expected.items():
            pipeline.set_adapters([NAME], [strength])
            checks.append(compared(family, f"diffusers at strength {strength:g}", probe(family), wanted))
    except (ValueError, RuntimeError, KeyError) as e:
        checks.append(Check("diffusers", False, f"its loader refuses the file: {str(e).splitlines()[0]}"))
    finally:
        if NAME in getattr(denoiser, "peft_config", {}):
            pipeline.delete_adapters([NAME])
    return checks


def by_controlnet(path: Path, artifact: Artifact, family, expected: dict[float, Tensor] | None) -> list[Check]:
    """The probe with the branch as diffusers loads it, which takes the config beside the file, against what is expected."""
    import diffusers

    checks = []
    for strength in STRENGTHS if (path.parent / "config.json").is_file() else ():
        with _control.added(family, [(artifact.tensors, strength)]):
            wanted = expected[strength] if expected else probe(family)
            try:
                json_object(str(path.parent), "config.json", None)      # is looked through
                read = diffusers.ControlNetModel.from_pretrained(path.parent, use_safetensors=True)
            except (FinetuneError, OSError, ValueError, RuntimeError) as e:
                return [*checks, Check("diffusers", False, f"its loader refuses the file: {str(e).splitlines()[0]}")]
            _control.scale(read, strength)
            family.parts["control"] = read.to(wanted.device)
            checks.append(compared(family, f"diffusers at strength {strength:g}", probe(family), wanted))
    return checks


def prompted(path: Path, artifact: Artifact, family, expected: dict[float, Tensor] | None) -> list[Check]:
    """A learned token: how long its rows are, that they are not where they began, and what diffusers makes of the file.
    `expected` are the encoder's states with the rows as they began, at 0, and as they are, at 1."""
    token, rows = _tokens.token(path), _tokens.rows(artifact)
    if not expected:
        with tokens.added(family, {token: rows}):
            expected = {1.0: states(family, token)}
    tables = {part: family.parts[part].get_input_embeddings().weight for part in rows}
    longest = max(t.float().norm(dim=1).max().item() / tables[part].float().norm(dim=1).mean().item() for part, t in rows.items())
    checks = [Check("length", longest <= LONGEST, f"{longest:.1f} times a word's, at most {LONGEST}")]
    if 0.0 in expected:
        moved = ((expected[1.0] - expected[0.0]).norm() / expected[0.0].norm()).item()
        checks.append(Check("moved", moved > 0, f"relative difference {moved:.1e} from the words it began as"))
    try:
        return checks + [compared(family, "prompts in diffusers", by_textual_inversion(path, token, family), expected[1.0])]
    except (ValueError, RuntimeError, KeyError) as e:
        return checks + [Check("diffusers", False, f"its loader refuses the file: {str(e).splitlines()[0]}")]


@torch.no_grad()
def states(family, token: str) -> Tensor:
    """What the text encoder makes of prompts with the token, as the family stands."""
    with resting(family.parts):
        return family.encode_text([prompt.format(token) for prompt in PROMPTS]).tokens


@torch.no_grad()
def by_textual_inversion(path: Path, token: str, family) -> Tensor:
    """The same with the file loaded by diffusers, into tokenizers and tables without learned tokens; of several encoders
    each gets its own tensor by hand, which is how diffusers wants it."""
    from diffusers.loaders import TextualInversionLoaderMixin

    pipeline, spec, loader = family.pipeline(draws=False), family.spec, TextualInversionLoaderMixin()
    loader.hf_device_map, loader.components = None, {}      # as of a pipeline: that of SD 3 has no such loader
    plain = family.learned.tokenizers if family.learned else family.tokenizers
    encoders = {part: family.parts[part] for part in tokens.text_parts(family)}
    files = {part: {token: rows} for part, rows in _tokens.rows(formats.load(path, spec)).items()} if len(encoders) > 1 else {
        "text": str(path)}
    before = {part: (encoder.get_input_embeddings(), encoder.config.vocab_size) for part, encoder in encoders.items()}
    try:
        for part, encoder in encoders.items():
            encoder.set_input_embeddings(nn.Embedding.from_pretrained(before[part][0].weight.detach().clone()))
            words = copy.deepcopy(plain[part])
            setattr(pipeline, spec.components[part].replace("text_encoder", "tokenizer"), words)
            loader.load_textual_inversion(files[part], token=token, text_encoder=encoder, tokenizer=words)
        with resting(family.parts):
            prompts = worded(pipeline, "prompt", [prompt.format(token) for prompt in PROMPTS])
            return pipeline.encode_prompt(**prompts, device=pipeline.device, num_images_per_prompt=1,
                                          do_classifier_free_guidance=False)[0].float()
    finally:
        for part, (table, size) in before.items():
            encoders[part].set_input_embeddings(table)
            encoders[part].config.vocab_size = size


def by_itself(artifact: Artifact, family, wanted: Tensor) -> Check:
    """A new VAE that has nothing but the file's weights draws what is wanted."""
    vae, name = family.parts["vae"], "a VAE of these weights alone"
    fresh = type(vae).from_config(vae.config).to(vae.device, vae.dtype).eval()
    try:
        fresh.load_state_dict({key.removeprefix("vae."): t for key, t in artifact.tensors.items()})
    except RuntimeError as e:
        return Check(name, False, " ".join(str(e).split())[:200])
    return compared(family, name, drawn(fresh), wanted)


def reloaded(path: Path, family, expected: dict[float, Tensor]) -> Check:
    """The probe of a whole model that is loaded again, against what is expected at strength 1. The trained one makes room:
    both would need twice the memory of a GPU that is just large enough for one."""
    device, dtype = expected[1.0].device, next(family.parts["denoiser"].parameters()).dtype
    skip = family.source.changes.clip_skip
    if path.is_dir():
        again = registry.find("families", family.spec.name).load(str(path), dtype, changes=Changes(clip_skip=skip))
    else:       # its own config may be none of the published ones
        again = copy.copy(family)
        again.parts = single_file.read(path, family)
        for part in tokens.text_parts(family):
            leave_out(again.parts[part], skip - 1)
    try:
        for parts, where in ((family.parts, "cpu"), (again.parts, device)):
            for part in parts.values():
                part.to(where)
        found = probe(again)
    finally:
        for parts, where in ((again.parts, "cpu"), (family.parts, device)):
            for part in parts.values():
                part.to(where)
    return compared(again, "loaded again as a base", found, expected[1.0])


def compared(family, name: str, found: Tensor, wanted: Tensor) -> Check:
    limit = TOLERANCE[next(next(iter(family.parts.values())).parameters()).dtype]      # the denoiser's, unless it was let go
    error = ((found - wanted).norm() / wanted.norm()).item()
    return Check(name, error <= limit, f"relative difference {error:.1e}, at most {limit:.0e}")


def merged(family, artifact, strength: float) -> Tensor:
    with families.merged(family.parts, [(artifact, strength)]):
        return drawn(family.parts["vae"]) if artifact.kind == "vae" else probe(family)


@torch.no_grad()
def probe(family) -> Tensor:
    """The denoiser's output at a fixed point, as the family stands."""
    denoiser, latents = family.parts["denoiser"], family.vae_config.get("latent_channels", 4)
    side = min(denoiser.config.sample_size, 32)
    x = noise.normal((denoiser.config.in_channels, side, side), 0, [0, 1], "verify").to(denoiser.device)
    pixels = side * family.stride
    t = family.path.time(torch.tensor(FRACTIONS, dtype=torch.float64), torch.full((2,), pixels ** 2))
    geometry = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * 2, device=x.device, dtype=x.dtype)
    with resting(family.parts):
        spare_memory()      # what the last probe read of the denoiser
        told = family.encode_text(["a picture", "a red circle"])
        spare_memory()      # the text encoders are done
        if "control" in family.parts:
            seen = noise.normal((3, pixels, pixels), 0, [0, 1], "verify condition").to(x).sigmoid()
            told = replace(told, control=seen)
        if family.shows:
            level = torch.tensor([0, 20], device=x.device) if family.shows == "small" else None
            told = replace(told, beside=x[:, latents:], level=level)
        return family.denoise(x[:, :latents], family.path.told(t).to(x.device), told, geometry)


@torch.no_grad()
def drawn(vae) -> Tensor:
    z = noise.normal((vae.config.latent_channels, 8, 8), 0, [0, 1], "verify").to(vae.device, vae.dtype)
    with resting({"vae": vae}):
        return vae.decode(z).sample.float()


def table(checks: list[Check]) -> str:
    return folded("\n".join(f"  {'ok  ' if check.passed else 'FAIL'}  {check.name:<28} {check.found}" for check in checks))


def as_json(results: dict[str, list[Check]]) -> str:
    return json.dumps({name: [asdict(check) for check in checks] for name, checks in results.items()}, indent=1) + "\n"
