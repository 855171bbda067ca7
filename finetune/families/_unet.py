"""Stable Diffusion with a UNet: text by cross-attention, one CLIP or two, a VAE (Rombach et al. 2022, Podell et al. 2024).

Shapes: B batch · L tokens · D text width · P pooled width · C latent channels · H W pixels · h w = H W / VAE stride.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from finetune.batch import Conditioning, joined
from finetune.diffusion.path import PREDICTIONS, Discrete, ddpm
from finetune.errors import FinetuneError
from finetune.families import _beside, _clip, _control, _latents
from finetune.families._altered import check_widths, opened
from finetune.families._source import Changes, Source
from finetune.families.base import FamilySpec, save, sketch, tokenizer, vocabulary
from finetune.families._clip import Clip
from finetune.tokens import Learned

CROSS = ("*.attn2.to_q", "*.attn2.to_k", "*.attn2.to_v", "*.attn2.to_out.0")
SELF = ("*.attn1.to_q", "*.attn1.to_k", "*.attn1.to_v", "*.attn1.to_out.0")
FEED_FORWARD = ("*.ff.net.0.proj", "*.ff.net.2")
TARGETS = {
    "cross_attention": CROSS,
    "attention": SELF + CROSS,
    "feed_forward": FEED_FORWARD,
    # What sd-scripts calls conv_dim: the layers of the blocks without attention (86 modules in SD 1.5)
    "conv": ("*.resnets.*.conv1", "*.resnets.*.conv2", "*.resnets.*.conv_shortcut", "*.resnets.*.time_emb_proj",
             "*.downsamplers.*.conv", "*.upsamplers.*.conv"),
    # sd-scripts' default: every Linear and 1×1 convolution inside the transformer blocks (192 modules in SD 1.5)
    "all": SELF + CROSS + FEED_FORWARD + ("*.attentions.*.proj_in", "*.attentions.*.proj_out"),
}


class UNetFamily:
    """A frozen base and the only code that knows how to call it. `text` says what is taken of each text encoder."""

    long: Literal["error", "truncate", "chunk"] = "error"      # what becomes of a caption that the text encoder cannot take
    learned: Learned | None = None                              # the tokens that were added to the tokenizers' own
    vae_config, stride = cached_property(_latents.config), cached_property(_latents.stride)
    moments, latents = _latents.moments, _latents.sample
    pieces, sketch, save = _clip.pieces, sketch, save

    def __init__(self, spec: FamilySpec, text: Mapping[str, Clip], source: Source, parts: dict[str, nn.Module],
                 tokenizers: dict[str, object], scheduler, small_scheduler=None):
        self.spec, self.text, self.source, self.parts = spec, text, source, parts
        self.tokenizers, self.scheduler, self.small_scheduler = tokenizers, scheduler, small_scheduler
        self.path = noising(scheduler.config)

    @property
    def step(self) -> int:
        """What the sides of a picture have to be multiples of."""
        return self.stride

    @property
    def zeros(self) -> bool:
        """Whether no text at all is zeros, and not what the encoders make of "": SDXL was trained so."""
        return "text_2" in self.text and bool(self.source.index.get("force_zeros_for_empty_prompt", True))

    @property
    def shows(self) -> Literal["hole", "small"] | None:
        """What the network wants to see beside noisy latents: the picture with a hole, where it is to paint; a small picture,
        which it is to enlarge; or nothing."""
        unet, vae = self.source.config("unet"), self.source.config("vae")
        more = unet.get("in_channels", 4) - vae.get("latent_channels", 4)
        return "small" if self.small_scheduler else "hole" if more else None

    @property
    def most_noise(self) -> int:
        """The level that the noise of a small picture is below."""
        return self.source.index.get("max_noise_level", 350)

    def cut_text(self, caption: str) -> str:
        """The end of the caption that would be lost unordered: unless it is empty, `encode_text` refuses the caption."""
        return "" if self.long == "truncate" else self.tokenizers["text"].decode(self.pieces(caption)[1])

    def cut_prompt(self, prompt: str) -> str:
        """What the sampler would lose of a prompt: it takes one piece, however captions are taken."""
        pieces, lost = self.pieces(prompt)
        return self.tokenizers["text"].decode(sum(pieces[1:], lost))

    def encode_text(self, captions: list[str]) -> Conditioning:
        """(B, L, D) float32, and (B, P) of SDXL; with `long: chunk` the pieces of a caption stand one behind the other and
        the first is pooled, as web UIs have it. Where `zeros`, an empty caption is the pipeline's missing negative prompt.

        Raises FinetuneError for a caption that would be cut, unless `long: truncate` orders it."""
        _clip.refuse_cut(self, captions)
        pieces = [self.pieces(caption)[0] for caption in captions]
        every = [piece for own in pieces for piece in own]
        found = [_clip.states(self.parts[part], self.tokenizers[part], every, take) for part, take in self.text.items()]
        counts = [len(own) for own in pieces]
        states = torch.cat([own for own, _ in found], -1).split(counts)         # of each caption: (pieces, 77, D)
        pooled = next((own.split(counts) for _, own in found if own is not None), [None] * len(captions))
        told = [Conditioning(own.flatten(0, 1)[None], one if one is None else one[:1]) for own, one in zip(states, pooled)]
        return joined([nothing(own) if self.zeros and not caption else own for own, caption in zip(told, captions)])

    def text_settings(self) -> list:
        """All that decides text states beside the encoders themselves."""
        skip = self.source.changes.clip_skip
        return [self.long, self.zeros, *([vocabulary(words), words.pad_token_id] for words in self.tokenizers.values()),
                *([f"clip skip {skip}"] if skip > 1 else [])]

    @property
    def kinds(self) -> dict[str, type[nn.Module]]:
        import diffusers
        import transformers

        text = {part: transformers.CLIPTextModelWithProjection if take.pooled else transformers.CLIPTextModel
                for part, take in self.text.items()}
        return {"denoiser": diffusers.UNet2DConditionModel, **text, "vae": diffusers.AutoencoderKL}

    def load_part(self, part: str, dtype: torch.dtype) -> nn.Module:
        # In float16 the VAE of SDXL overflows: its config says so, and its pipeline would widen it for each picture.
        wide = part == "vae" and dtype == torch.float16 and "text_2" in self.text and self.vae_config.get("force_upcast", True)
        found = self.source.load(self.kinds[part], self.spec.components[part], torch.float32 if wide else dtype)
        if part in self.text and self.text[part].pooled:
            _clip.end_at(found, self.tokenizers[part].eos_token_id)
        if wide:
            found.post_quant_conv.register_forward_pre_hook(lambda layer, latents: (latents[0].float(),))
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        return self.source.notes

    def beside(self, shown: Tensor, seed: int, positions: list[int]) -> dict[str, Tensor]:
        """What the data room shows, as fields of the Conditioning."""
        if self.shows is None:      # the condition of a control branch, as it is
            return {"control": shown}
        make = {"hole": _beside.painting, "small": _beside.enlarging}[self.shows]
        return make(self, shown, seed, positions)

    def denoise(self, x_BChw: Tensor, t_B: Tensor, conditioning: Conditioning, geometry_B6: Tensor) -> Tensor:
        """The network's prediction, (B, C, h, w) float32. Only SDXL is told the geometry, and what is pooled."""
        unet, added = self.parts["denoiser"], {}
        dtype = next(p.dtype for p in unet.parameters() if p.is_floating_point())     # unet.dtype visits every module first
        if conditioning.beside is not None:
            x_BChw = torch.cat([x_BChw, conditioning.beside], 1)
        if conditioning.pooled is not None:
            added = {"added_cond_kwargs": {"text_embeds": conditioning.pooled.to(dtype), "time_ids": geometry_B6}}
        if conditioning.level is not None:
            added = {"class_labels": conditioning.level}
        x_BChw = x_BChw.to(dtype)
        if conditioning.control is not None:
            added |= _control.residuals(self.parts["control"], x_BChw, t_B, conditioning.tokens, conditioning.control, added)
        return unet(x_BChw, t_B, encoder_hidden_states=conditioning.tokens.to(dtype),
                    encoder_attention_mask=conditioning.mask, **added).sample.float()

    def pipeline(self, draws: bool = True):
        """The diffusers pipeline over these very parts; one that draws no pictures has no VAE. With a control branch it is
        the one that follows a picture."""
        import diffusers

        components = {component: self.parts[part] if draws or part != "vae" else None
                      for part, component in self.spec.components.items()} | {
            tokenizer(self.spec, part): words for part, words in self.tokenizers.items()}
        # A scheduler of its own: sampling rewrites its tables.
        components["scheduler"] = type(self.scheduler).from_config(self.scheduler.config)
        if self.shows == "small":
            return diffusers.StableDiffusionUpscalePipeline(**components, low_res_scheduler=self.small_scheduler,
                                                            max_noise_level=self.most_noise)
        xl, controlled = "text_2" in self.text, "control" in self.parts
        components |= {"controlnet": self.parts["control"]} if controlled else {}
        cls = getattr(diffusers, f"StableDiffusion{'XL' * xl}{'ControlNet' * controlled}"
                                 f"{'Inpaint' * (self.shows == 'hole')}Pipeline")
        return cls(**components, **{"force_zeros_for_empty_prompt": self.zeros, "add_watermarker": False} if xl else
                   {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False})


def nothing(told: Conditioning) -> Conditioning:
    return Conditioning(torch.zeros_like(told.tokens), None if told.pooled is None else torch.zeros_like(told.pooled))


def noising(config) -> Discrete:
    """The path that a scheduler config describes. Raises FinetuneError for one that is not known here."""
    if config.prediction_type not in list(PREDICTIONS):
        raise FinetuneError(f"base.path: its scheduler predicts {config.prediction_type!r}; known: {', '.join(PREDICTIONS)}")
    own = config.get("trained_betas")
    try:
        return ddpm(config.beta_schedule if own is None else list(own), config.beta_start, config.beta_end,
                    config.num_train_timesteps, config.prediction_type, bool(config.get("rescale_betas_zero_snr")))
    except (ValueError, TypeError) as e:
        raise FinetuneError(f"base.path: its scheduler: {e}") from None


def outline(spec: FamilySpec, path: str, revision: str | None = None, variant: str | None = None,
            changes: Changes = Changes(), text: Mapping[str, Clip] = {"text": Clip()}) -> UNetFamily:
    """The base without its parts and their weights: enough to count tokens and to plan sizes."""
    source = opened(spec, path, revision, variant, changes)
    words = {part: source.tokenizer(tokenizer(spec, part)) for part in text}
    check_widths(source, spec)
    return UNetFamily(spec, text, source, {}, words, source.scheduler(),
                      source.scheduler("low_res_scheduler") if spec.name == "upscaler" else None)
