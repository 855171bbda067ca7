"""Stable Diffusion 1.x: a UNet with text cross-attention, one CLIP, a 4-channel VAE (Rombach et al. 2022).

Shapes: B batch · L tokens · D text width · C latent channels · H W pixels · h w = H W / VAE stride.
"""

from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from finetune import registry
from finetune.batch import Conditioning, joined
from finetune.diffusion.path import PREDICTIONS, Path, ddpm
from finetune.errors import FinetuneError
from finetune.families.base import FamilySpec, Source, check_family, locate, publish_text_encoder
from finetune.tokens import Learned

CROSS = ("*.attn2.to_q", "*.attn2.to_k", "*.attn2.to_v", "*.attn2.to_out.0")
SELF = ("*.attn1.to_q", "*.attn1.to_k", "*.attn1.to_v", "*.attn1.to_out.0")
FEED_FORWARD = ("*.ff.net.0.proj", "*.ff.net.2")
# What sd-scripts calls conv_dim: the layers of the blocks without attention (86 modules in SD 1.5)
CONV = ("*.resnets.*.conv1", "*.resnets.*.conv2", "*.resnets.*.conv_shortcut", "*.resnets.*.time_emb_proj",
        "*.downsamplers.*.conv", "*.upsamplers.*.conv")

PIECES = 3      # of a long caption, at most: 225 tokens, what the field trains with

SPEC = FamilySpec(
    name="sd1",
    components={"denoiser": "unet", "text": "text_encoder", "vae": "vae"},
    kohya={"denoiser": "lora_unet", "text": "lora_te"},
    base_version="sd_v1",
    architecture="stable-diffusion-v1",
    targets={
        "cross_attention": CROSS,
        "attention": SELF + CROSS,
        "feed_forward": FEED_FORWARD,
        "conv": CONV,
        # sd-scripts' default: every Linear and 1×1 convolution inside the transformer blocks (192 modules in SD 1.5)
        "all": SELF + CROSS + FEED_FORWARD + ("*.attentions.*.proj_in", "*.attentions.*.proj_out"),
    },
)


class SD1:
    """A frozen base and the only code that knows how to call it."""

    spec = SPEC
    long: Literal["error", "truncate", "chunk"] = "error"      # what becomes of a caption that the text encoder cannot take
    learned: Learned | None = None                              # the tokens that were added to the tokenizer's own

    def __init__(self, source: Source, parts: dict[str, nn.Module], tokenizer, scheduler):
        self.source, self.parts, self.tokenizer, self.scheduler = source, parts, tokenizer, scheduler
        self.path = noising(scheduler.config)

    @cached_property
    def stride(self) -> int:
        """Pixels per latent, along each axis."""
        return 2 ** (len(self.source.config("vae").get("block_out_channels", [64])) - 1)

    @torch.no_grad()
    def moments(self, pixels_B3HW: Tensor) -> Tensor:
        """Mean and log-variance of the VAE's posterior, (B, 2C, h, w) float32; the same inside the loop as before it."""
        vae = self.parts["vae"]
        with torch.autocast(vae.device.type, enabled=False):
            posterior = vae.encode(pixels_B3HW.to(vae.device, vae.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], 1).float()

    def latents(self, moments: Tensor, noise_BChw: Tensor) -> Tensor:
        """A sample of the posterior as the denoiser wants it, (B, C, h, w); `noise` is standard normal."""
        mean, logvar = moments.chunk(2, 1)
        return (mean + (0.5 * logvar).exp() * noise_BChw) * self.parts["vae"].config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents_BChw: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), about [-1, 1]."""
        vae = self.parts["vae"]
        return vae.decode(latents_BChw.to(vae.device, vae.dtype) / vae.config.scaling_factor).sample.float()

    def pieces(self, caption: str) -> tuple[list[list[int]], list[int]]:
        """The caption's tokens in pieces that the text encoder can take, and those that would be lost unordered."""
        ids = self.tokenizer(caption, add_special_tokens=False, verbose=False).input_ids
        ids = self.learned.spelled(ids) if self.learned else ids
        room = self.tokenizer.model_max_length - 2
        pieces = [ids[first:first + room] for first in range(0, len(ids), room)] or [[]]
        most = PIECES if self.long == "chunk" else 1
        return pieces[:most], [] if self.long == "truncate" else sum(pieces[most:], [])

    def cut_text(self, caption: str) -> str:
        """The end of the caption that would be lost unordered: unless it is empty, `encode_text` refuses the caption."""
        return self.tokenizer.decode(self.pieces(caption)[1])

    def encode_text(self, captions: list[str]) -> Conditioning:
        """(B, L, D) float32; with `long: chunk` the pieces of a caption stand one behind the other, as web UIs have it.

        Raises FinetuneError for a caption that would be cut, unless `long: truncate` orders it."""
        pieces, lost = zip(*map(self.pieces, captions))
        for caption, own, cut in zip(captions, pieces, lost):
            if cut:
                raise FinetuneError(f"a caption is longer than {sum(map(len, own))} tokens; "
                                    f"it would lose {self.tokenizer.decode(cut)!r}:\n    {caption}")
        text, words = self.parts["text"], self.tokenizer
        rows = [[words.bos_token_id, *piece, words.eos_token_id] for own in pieces for piece in own]
        ids = torch.tensor([row + [words.pad_token_id] * (words.model_max_length - len(row)) for row in rows])
        states = text(ids.to(text.device))[0].float().split([len(own) for own in pieces])       # of each: (pieces, 77, D)
        return joined([Conditioning(own.flatten(0, 1)[None]) for own in states])

    def denoise(self, x_BChw: Tensor, t_B: Tensor, conditioning: Conditioning, geometry_B6: Tensor) -> Tensor:
        """The network's prediction, (B, C, h, w) float32; SD 1.x is not told the geometry."""
        unet = self.parts["denoiser"]
        return unet(x_BChw.to(unet.dtype), t_B, encoder_hidden_states=conditioning.tokens.to(unet.dtype),
                    encoder_attention_mask=conditioning.mask).sample.float()

    def pipeline(self):
        """The diffusers pipeline over these very parts."""
        from diffusers import StableDiffusionPipeline

        # A scheduler of its own: sampling rewrites its tables.
        return StableDiffusionPipeline(
            **{self.spec.components[part]: module for part, module in self.parts.items()}, tokenizer=self.tokenizer,
            scheduler=type(self.scheduler).from_config(self.scheduler.config), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False)

    def save(self, folder, dtype: torch.dtype) -> None:
        """A diffusers folder with the weights in `dtype`, under the published names."""
        for module in self.parts.values():
            module.to(dtype)
        self.tokenizer.backend_tokenizer.no_padding()       # how it was last called would be saved with it
        self.tokenizer.backend_tokenizer.no_truncation()
        self.pipeline().save_pretrained(folder)
        publish_text_encoder(folder / "text_encoder")
        self.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))      # vocab.json, merges.txt


def noising(config) -> Path:
    """The path that a scheduler config describes. Raises FinetuneError for one that is not known here."""
    if config.prediction_type not in PREDICTIONS:
        raise FinetuneError(f"base.path: its scheduler predicts {config.prediction_type!r}; known: {', '.join(PREDICTIONS)}")
    own = config.get("trained_betas")
    try:
        return ddpm(config.beta_schedule if own is None else list(own), config.beta_start, config.beta_end,
                    config.num_train_timesteps, config.prediction_type, bool(config.get("rescale_betas_zero_snr")))
    except ValueError as e:
        raise FinetuneError(f"base.path: its scheduler: {e}") from None


def load(path: str, dtype: torch.dtype = torch.float32, revision: str | None = None, variant: str | None = None) -> SD1:
    """The base at `path`, every part frozen, in eval mode and in `dtype`. Raises FinetuneError when it is none of SD 1.x."""
    source = _located(path, revision, variant)
    import diffusers
    from transformers import CLIPTextModel

    classes = {"denoiser": diffusers.UNet2DConditionModel, "text": CLIPTextModel, "vae": diffusers.AutoencoderKL}
    parts = {part: source.load(cls, SPEC.components[part], dtype) for part, cls in classes.items()}
    return SD1(source, parts, *_tokenizer_and_scheduler(source, parts["text"].config.vocab_size))


def outline(path: str, revision: str | None = None, variant: str | None = None) -> SD1:
    """The base without its parts and their weights: enough to count tokens and to plan sizes."""
    source = _located(path, revision, variant)
    vocabulary = source.config("text_encoder").get("vocab_size", 49408)     # CLIP's, where a config leaves it out
    return SD1(source, {}, *_tokenizer_and_scheduler(source, vocabulary))


def _located(path: str, revision: str | None, variant: str | None) -> Source:
    source = locate(path, revision, variant)
    check_family(source, SPEC, registry.names("families"))
    return source


def _tokenizer_and_scheduler(source: Source, vocabulary: int) -> tuple:
    import diffusers
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(source.path, subfolder="tokenizer", revision=source.revision)
        name = source.index["scheduler"][1]
        if not name.endswith("Scheduler"):      # the file names a class: nothing but a scheduler is built from it
            raise ValueError(f"model_index.json: {name!r} is no scheduler")
        scheduler = getattr(diffusers, name).from_pretrained(source.path, subfolder="scheduler", revision=source.revision)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, NotImplementedError) as e:
        raise FinetuneError(f"base.path: {source.path}: its tokenizer or scheduler cannot be loaded\n    {e}") from None
    if len(tokenizer) != vocabulary:        # without its files transformers makes an empty one
        raise FinetuneError(f"base.path: {source.path}: its tokenizer has {len(tokenizer)} tokens, "
                            f"its text_encoder {vocabulary}")
    return tokenizer, scheduler
