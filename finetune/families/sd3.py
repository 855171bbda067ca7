"""Stable Diffusion 3 and 3.5: an MM-DiT, to which text and picture are one sequence, on rectified flow; two CLIPs, a T5 that
may be missing, a VAE of 16 channels (Esser et al. 2024).

Shapes: B batch · L tokens · D text width · P pooled width · C latent channels · H W pixels · h w = H W / VAE stride.
"""

from functools import cached_property
from pathlib import Path as Folder
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from finetune import registry
from finetune.batch import Conditioning
from finetune.diffusion.path import RectifiedFlow
from finetune.errors import FinetuneError
from finetune.families import _clip, _latents
from finetune.families._clip import Clip
from finetune.families._altered import altered
from finetune.families.base import (
    Changes, FamilySpec, Parts, Source, check_family, locate, publish_text_encoder, sketched, vocabulary,
)
from finetune.tokens import Learned

# Where text and picture meet; without patterns that not every version has: only 3.5 medium has an attn2, of the picture alone.
OF_TEXT = ("*.attn.add_q_proj", "*.attn.add_k_proj", "*.attn.add_v_proj", "*.attn.to_add_out")
JOINT = ("*.attn.to_q", "*.attn.to_k", "*.attn.to_v", "*.attn.to_out.0") + OF_TEXT
ATTENTION = ("*.attn*.to_q", "*.attn*.to_k", "*.attn*.to_v", "*.attn*.to_out.0") + OF_TEXT
FEED_FORWARD = ("*.ff.net.0.proj", "*.ff.net.2", "*.ff_context.net.0.proj", "*.ff_context.net.2")
SPEC = FamilySpec(
    name="sd3",
    components={"denoiser": "transformer", "text": "text_encoder", "text_2": "text_encoder_2", "t5": "text_encoder_3",
                "vae": "vae"},
    kohya={"denoiser": "lora_unet", "text": "lora_te1", "text_2": "lora_te2", "t5": "lora_te3"},
    base_version="sd3",
    architecture="stable-diffusion-3",
    targets={"cross_attention": JOINT, "attention": ATTENTION, "feed_forward": FEED_FORWARD, "all": ATTENTION + FEED_FORWARD},
    joint=True,
)
TOKENIZERS = {"text": "tokenizer", "text_2": "tokenizer_2", "t5": "tokenizer_3"}
CLIPS, CLIP = ("text", "text_2"), Clip(hidden=-2, pooled=True)
LENGTH = 256        # tokens of T5, what diffusers' pipeline samples with; its training script takes 77 unless told


class Sd3:
    """A frozen base and the only code that knows how to call it. T5 is a part that no method trains."""

    spec = SPEC
    shows = None                            # what it is shown beside noisy latents: nothing
    learned: Learned | None = None          # the tokens that were added to the CLIPs' own; T5 reads their names

    def __init__(self, source: Source, parts: dict[str, nn.Module], tokenizers: dict[str, object], scheduler):
        self.source, self.parts, self.tokenizers, self.scheduler = source, parts, tokenizers, scheduler
        self.path, self._long = noising(scheduler.config), "error"

    @property
    def long(self) -> Literal["error", "truncate"]:
        """What becomes of a caption that is too long."""
        return self._long

    @long.setter
    def long(self, long: str) -> None:
        if long == "chunk":
            raise FinetuneError("data.caption.long: chunk is not for sd3: it has no mask that would hide from a short caption "
                                f"how long its neighbours are. Its T5 reads {LENGTH - 1} tokens; truncate leaves out the rest")
        self._long = long

    @cached_property
    def vae_config(self) -> dict:
        return self.source.config("vae")

    @cached_property
    def stride(self) -> int:
        """Pixels per latent, along each axis."""
        return _latents.stride(self.source.config("vae"))

    @cached_property
    def step(self) -> int:
        """What the sides of a picture have to be multiples of: latents are seen in patches."""
        return self.stride * self.source.config("transformer")["patch_size"]

    def moments(self, pixels_B3HW: Tensor) -> Tensor:
        return _latents.moments(self.parts["vae"], pixels_B3HW)

    def latents(self, moments: Tensor, noise_BChw: Tensor) -> Tensor:
        return _latents.sample(self.vae_config, moments, noise_BChw)

    def decode_latents(self, latents_BChw: Tensor) -> Tensor:
        return _latents.decode(self.parts["vae"], latents_BChw)

    def pieces(self, caption: str) -> tuple[list[list[int]], list[int]]:
        """The tokens that the CLIPs take of a caption, which are one piece, and those that they do not."""
        words = self.tokenizers["text"]
        ids = words(caption, add_special_tokens=False, verbose=False).input_ids
        return _clip.split(self.learned.spelled(ids) if self.learned else ids, words.model_max_length - 2, 1)

    def cut_text(self, caption: str) -> str:
        """The end of the caption that would be lost unordered: unless it is empty, `encode_text` refuses the caption."""
        return "" if self.long == "truncate" else self.cut_prompt(caption)

    def cut_prompt(self, prompt: str) -> str:
        """The end that no encoder reads. Where there is a T5, the CLIPs take the beginning alone, as in diffusers."""
        if "t5" not in self.tokenizers:
            return self.tokenizers["text"].decode(self.pieces(prompt)[1])
        words = self.tokenizers["t5"]
        return words.decode(words(prompt, add_special_tokens=False, verbose=False).input_ids[LENGTH - 1:])

    def encode_text(self, captions: list[str]) -> Conditioning:
        """(B, L, D) float32, the CLIPs' last states but one side by side and then T5's, and (B, P), as diffusers'
        StableDiffusion3Pipeline has them.

        Raises FinetuneError for a caption that would be cut, unless `long: truncate` orders it."""
        for caption in captions:
            if cut := self.cut_text(caption):
                raise FinetuneError(f"a caption is too long for the text encoders; it would lose {cut!r}:\n    {caption}")
        pieces = [self.pieces(caption)[0][0] for caption in captions]
        found = [_clip.states(self.parts[part], self.tokenizers[part], pieces, CLIP) for part in CLIPS]
        clips, t5 = torch.cat([states for states, _ in found], -1), self.read(captions)
        return Conditioning(torch.cat([pad(clips, (0, t5.shape[-1] - clips.shape[-1])), t5], 1),
                            torch.cat([pooled for _, pooled in found], -1))

    def read(self, captions: list[str]) -> Tensor:
        """T5's states, (B, 256, D) float32. Without it zeros, as in diffusers: the network was trained with each encoder left
        out now and then (Esser et al. 2024)."""
        denoiser = self.parts["denoiser"]
        if "t5" not in self.parts:
            return torch.zeros(len(captions), LENGTH, denoiser.config.joint_attention_dim, device=denoiser.device)
        ids = self.tokenizers["t5"](captions, padding="max_length", max_length=LENGTH, truncation=True,
                                    return_tensors="pt", verbose=False).input_ids
        return self.parts["t5"](ids.to(self.parts["t5"].device)).last_hidden_state.float()

    def text_settings(self) -> list:
        """All that decides text states beside the encoders themselves."""
        return [self.long, LENGTH, *([vocabulary(words), words.pad_token_id] for words in self.tokenizers.values())]

    def denoise(self, x_BChw: Tensor, t_B: Tensor, conditioning: Conditioning, geometry_B6: Tensor) -> Tensor:
        """The network's prediction, (B, C, h, w) float32. It is not told the geometry."""
        transformer = self.parts["denoiser"]
        return transformer(x_BChw.to(transformer.dtype), conditioning.tokens.to(transformer.dtype),
                           conditioning.pooled.to(transformer.dtype), t_B).sample.float()

    def pipeline(self, draws: bool = True):
        """The diffusers pipeline over these very parts; one that draws no pictures has no VAE."""
        import diffusers

        components = dict.fromkeys([*TOKENIZERS.values(), *SPEC.components.values()])
        components |= {SPEC.components[part]: self.parts[part] for part in present(self.tokenizers) if draws or part != "vae"}
        components |= {TOKENIZERS[part]: words for part, words in self.tokenizers.items()}
        # A scheduler of its own: sampling rewrites its tables.
        components["scheduler"] = type(self.scheduler).from_config(self.scheduler.config)
        return diffusers.StableDiffusion3Pipeline(**components)

    def sketch(self, dtype: torch.dtype) -> None:
        """Give an outline its parts from their configs alone; inside a FakeTensorMode they have shapes and no numbers."""
        self.parts |= {part: sketched(kind(part), self.source.config(SPEC.components[part]), dtype)
                       for part in present(self.tokenizers)}

    def save(self, folder: Folder, dtype: torch.dtype) -> None:
        """A diffusers folder with the weights in `dtype`, under the published names."""
        for module in self.parts.values():
            module.to(dtype)
        self.pipeline().save_pretrained(folder)
        for part in CLIPS:
            publish_text_encoder(folder / SPEC.components[part])
            self.tokenizers[part].backend_tokenizer.model.save(str(folder / TOKENIZERS[part]))  # vocab.json, merges.txt


def noising(config) -> RectifiedFlow:
    """The path that a scheduler config describes. Raises FinetuneError for one that is not known here."""
    if "shift" not in config or config.get("use_dynamic_shifting") or config.num_train_timesteps != 1000:
        raise FinetuneError("base.path: its scheduler is not that of Stable Diffusion 3, which has 1000 steps of rectified flow "
                            "and one shift for all sizes (use_dynamic_shifting: false)")
    return RectifiedFlow(config.shift)


def load(path: str, dtype: torch.dtype = torch.float32, revision: str | None = None, variant: str | None = None,
         changes: Changes = Changes()) -> Sd3:
    """The base at `path`, every part frozen, in eval mode and in `dtype`. Raises FinetuneError when it is another family's."""
    bare = outline(path, revision, variant, changes)

    def part(name: str) -> nn.Module:
        found = bare.source.load(kind(name), SPEC.components[name], dtype)
        if name in CLIPS:
            _clip.end_at(found, eos[name])
        for path, layer in found.named_modules() if name == "t5" and dtype == torch.float16 else ():
            if path.endswith(".wo"):        # these overflow in float16: transformers holds them in float32 too
                layer.float()
        return found

    eos = {name: words.eos_token_id for name, words in bare.tokenizers.items()}
    return Sd3(bare.source, Parts(part, present(bare.tokenizers)), bare.tokenizers, bare.scheduler)


def present(tokenizers: dict[str, object]) -> list[str]:
    """The parts: a T5 without a vocabulary is none."""
    return [part for part in SPEC.components if part != "t5" or part in tokenizers]


def kind(part: str) -> type[nn.Module]:
    """The class of a part."""
    import diffusers
    import transformers

    return {"denoiser": diffusers.SD3Transformer2DModel, "vae": diffusers.AutoencoderKL,
            "t5": transformers.T5EncoderModel}.get(part, transformers.CLIPTextModelWithProjection)


def outline(path: str, revision: str | None = None, variant: str | None = None, changes: Changes = Changes()) -> Sd3:
    """The base without its parts and their weights: enough to count tokens and to plan sizes."""
    source = locate(path, revision, variant)
    check_family(source, SPEC, registry.names("families"))
    source = altered(source, SPEC, changes)
    spoken = [part for part in TOKENIZERS if part != "t5" or source.has("text_encoder_3") and source.has("tokenizer_3")]
    return Sd3(source, {}, {part: source.tokenizer(TOKENIZERS[part]) for part in spoken}, source.scheduler())
