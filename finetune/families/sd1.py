"""Stable Diffusion 1.x: a UNet with text cross-attention, one CLIP, a 4-channel VAE (Rombach et al. 2022).

Shapes: B batch · L tokens · D text width · C latent channels · H W pixels · h w = H W / VAE stride.
"""

import torch
from torch import Tensor, nn

from finetune import registry
from finetune.batch import Conditioning
from finetune.diffusion.path import PREDICTIONS, Path, ddpm
from finetune.errors import FinetuneError
from finetune.families.base import FamilySpec, Source, check_family, locate, publish_text_encoder

CROSS = ("*.attn2.to_q", "*.attn2.to_k", "*.attn2.to_v", "*.attn2.to_out.0")
SELF = ("*.attn1.to_q", "*.attn1.to_k", "*.attn1.to_v", "*.attn1.to_out.0")
FEED_FORWARD = ("*.ff.net.0.proj", "*.ff.net.2")

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
        # sd-scripts' default: every Linear and 1×1 convolution inside the transformer blocks (192 modules in SD 1.5)
        "all": SELF + CROSS + FEED_FORWARD + ("*.attentions.*.proj_in", "*.attentions.*.proj_out"),
    },
)


class SD1:
    """A frozen base and the only code that knows how to call it."""

    spec = SPEC

    def __init__(self, source: Source, parts: dict[str, nn.Module], tokenizer, scheduler):
        self.source, self.parts, self.tokenizer, self.scheduler = source, parts, tokenizer, scheduler
        self.path = noising(scheduler.config)

    @property
    def stride(self) -> int:
        """Pixels per latent, along each axis."""
        return 2 ** (len(self.parts["vae"].config.block_out_channels) - 1)

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

    def cut_text(self, caption: str) -> str:
        """The end of the caption that does not fit into the text encoder; empty when all of it fits."""
        limit = self.tokenizer.model_max_length
        ids = self.tokenizer(caption, truncation=False, verbose=False).input_ids
        return self.tokenizer.decode(ids[limit - 1:-1]) if len(ids) > limit else ""

    def encode_text(self, captions: list[str]) -> Conditioning:
        """(B, L, D) float32. Raises FinetuneError for a caption that would be cut."""
        for caption in captions:
            if cut := self.cut_text(caption):
                raise FinetuneError(f"a caption is longer than {self.tokenizer.model_max_length - 2} tokens; "
                                    f"it would lose {cut!r}:\n    {caption}")
        text = self.parts["text"]
        ids = self.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        return Conditioning(text(ids.to(text.device))[0].float())

    def denoise(self, x_BChw: Tensor, t_B: Tensor, conditioning: Conditioning, geometry_B6: Tensor) -> Tensor:
        """The network's prediction, (B, C, h, w) float32; SD 1.x is not told the geometry."""
        unet = self.parts["denoiser"]
        return unet(x_BChw.to(unet.dtype), t_B, encoder_hidden_states=conditioning.tokens.to(unet.dtype)).sample.float()

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
        self.pipeline().save_pretrained(folder)
        publish_text_encoder(folder / "text_encoder")
        self.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))      # vocab.json, merges.txt


def noising(config) -> Path:
    """The path that a scheduler config describes. Raises FinetuneError for one that is not known here."""
    if config.prediction_type not in PREDICTIONS:
        raise FinetuneError(f"base.path: its scheduler predicts {config.prediction_type!r}; known: {', '.join(PREDICTIONS)}")
    if config.get("rescale_betas_zero_snr") or config.get("trained_betas") is not None:
        raise FinetuneError("base.path: its scheduler has zero terminal SNR or its own betas, which cannot be trained yet")
    try:
        return ddpm(config.beta_schedule, config.beta_start, config.beta_end, config.num_train_timesteps,
                    config.prediction_type)
    except ValueError as e:
        raise FinetuneError(f"base.path: its scheduler: {e}") from None


def load(path: str, dtype: torch.dtype = torch.float32, revision: str | None = None, variant: str | None = None) -> SD1:
    """The base at `path`, every part frozen, in eval mode and in `dtype`. Raises FinetuneError when it is none of SD 1.x."""
    source = locate(path, revision, variant)
    check_family(source, SPEC, registry.names("families"))
    import diffusers
    from transformers import CLIPTextModel, CLIPTokenizer

    classes = {"denoiser": diffusers.UNet2DConditionModel, "text": CLIPTextModel, "vae": diffusers.AutoencoderKL}
    parts = {part: source.load(cls, SPEC.components[part], dtype) for part, cls in classes.items()}
    try:
        tokenizer = CLIPTokenizer.from_pretrained(source.path, subfolder="tokenizer", revision=revision)
        name = source.index["scheduler"][1]
        if not name.endswith("Scheduler"):      # the file names a class: nothing but a scheduler is built from it
            raise ValueError(f"model_index.json: {name!r} is no scheduler")
        scheduler = getattr(diffusers, name).from_pretrained(source.path, subfolder="scheduler", revision=revision)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise FinetuneError(f"base.path: {source.path}: its tokenizer or scheduler cannot be loaded\n    {e}") from None
    if len(tokenizer) != (rows := parts["text"].config.vocab_size):     # without its files transformers makes an empty one
        raise FinetuneError(f"base.path: {source.path}: its tokenizer has {len(tokenizer)} tokens, its text_encoder {rows}")
    return SD1(source, parts, tokenizer, scheduler)
