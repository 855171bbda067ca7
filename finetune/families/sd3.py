"""Stable Diffusion 3 and 3.5: an MM-DiT, to which text and picture are one sequence, on rectified flow; two CLIPs, a T5 that
may be missing, a VAE of 16 channels (Esser et al. 2024).

Shapes: B batch · L tokens · D text width · P pooled width · C latent channels · H W pixels · h w = H W / VAE stride.
"""

from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from finetune.batch import Conditioning
from finetune.diffusion.path import RectifiedFlow
from finetune.errors import FinetuneError
from finetune.families import _clip, _latents, base
from finetune.families._clip import Clip
from finetune.families._altered import check_widths, opened
from finetune.families._source import Changes, Source
from finetune.families.base import FamilySpec, save, sketch, tokenizer, vocabulary
from finetune.tokens import Learned

# Where text and picture meet; without patterns that not every version has: only 3.5 medium has an attn2, of the picture alone.
OF_TEXT = ("*.attn.add_q_proj", "*.attn.add_k_proj", "*.attn.add_v_proj", "*.attn.to_add_out")
JOINT = ("*.attn.to_q", "*.attn.to_k", "*.attn.to_v", "*.attn.to_out.0") + OF_TEXT
ATTENTION = ("*.attn*.to_q", "*.attn*.to_k", "*.attn*.to_v", "*.attn*.to_out.0") + OF_TEXT
FEED_FORWARD = ("*.ff.net.0.proj", "*.ff.net.2", "*.ff_context.net.0.proj", "*.ff_context.net.2")
SPEC = FamilySpec(
    name="sd3",
    components={"denoiser": "transformer", "text": "text_encoder", "text_2": "text_encoder_2", "text_3": "text_encoder_3",
                "vae": "vae"},
    kohya={"denoiser": "lora_unet", "text": "lora_te1", "text_2": "lora_te2"},
    base_version="sd3",
    architecture="stable-diffusion-3",
    targets={"cross_attention": JOINT, "attention": ATTENTION, "feed_forward": FEED_FORWARD, "all": ATTENTION + FEED_FORWARD},
    joint=True,
)
CLIPS, CLIP = ("text", "text_2"), Clip(hidden=-2, pooled=True)
LENGTH = 256        # tokens of T5, what diffusers' pipeline samples with; its training script takes 77 unless told


class Sd3:
    """A frozen base and the only code that knows how to call it. T5 is a part that no method trains."""

    spec = SPEC
    shows = None                            # what it is shown beside noisy latents: nothing
    learned: Learned | None = None          # the tokens that were added to the CLIPs' own; T5 reads their names
    vae_config, stride = cached_property(_latents.config), cached_property(_latents.stride)
    moments, latents = _latents.moments, _latents.sample
    pieces, sketch, save = _clip.pieces, sketch, save

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
    def step(self) -> int:
        """What the sides of a picture have to be multiples of: latents are seen in patches."""
        return self.stride * self.source.config("transformer")["patch_size"]

    def cut_text(self, caption: str) -> str:
        """The end of the caption that would be lost unordered: unless it is empty, `encode_text` refuses the caption."""
        return "" if self.long == "truncate" else self.cut_prompt(caption)

    def cut_prompt(self, prompt: str) -> str:
        """The end that no encoder reads. Where there is a T5, the CLIPs take the beginning alone, as in diffusers."""
        if "text_3" not in self.tokenizers:
            return self.tokenizers["text"].decode(self.pieces(prompt)[1])
        words = self.tokenizers["text_3"]
        return words.decode(words(prompt, add_special_tokens=False, verbose=False).input_ids[LENGTH - 1:])

    def encode_text(self, captions: list[str]) -> Conditioning:
        """(B, L, D) float32, the CLIPs' last states but one side by side and then T5's, and (B, P), as diffusers'
        StableDiffusion3Pipeline has them.

        Raises FinetuneError for a caption that would be cut, unless `long: truncate` orders it."""
        _clip.refuse_cut(self, captions)
        pieces = [self.pieces(caption)[0][0] for caption in captions]
        found = [_clip.states(self.parts[part], self.tokenizers[part], pieces, CLIP) for part in CLIPS]
        clips, t5 = torch.cat([states for states, _ in found], -1), self.read(captions)
        return Conditioning(torch.cat([pad(clips, (0, t5.shape[-1] - clips.shape[-1])), t5], 1),
                            torch.cat([pooled for _, pooled in found], -1))

    def read(self, captions: list[str]) -> Tensor:
        """T5's states, (B, 256, D) float32. Without it zeros, as in diffusers: the network was trained with each encoder left
        out now and then (Esser et al. 2024)."""
        denoiser = self.parts["denoiser"]
        if "text_3" not in self.tokenizers:
            return torch.zeros(len(captions), LENGTH, denoiser.config.joint_attention_dim, device=denoiser.device)
        ids = self.tokenizers["text_3"](captions, padding="max_length", max_length=LENGTH, truncation=True,
                                    return_tensors="pt", verbose=False).input_ids
        return self.parts["text_3"](ids.to(self.parts["text_3"].device)).last_hidden_state.float()

    def text_settings(self) -> list:
        """All that decides text states beside the encoders themselves."""
        return [self.long, LENGTH, *([vocabulary(words), words.pad_token_id] for words in self.tokenizers.values())]

    @property
    def notes(self) -> tuple[str, ...]:
        clips = self.tokenizers["text"].model_max_length - 2
        t5 = f"its T5 reads {LENGTH - 1} tokens of a caption, its CLIPs the first {clips} of them" \
            if "text_3" in self.tokenizers else f"it is taken without a T5: its CLIPs read {clips} tokens of a caption"
        return (*self.source.notes, t5)

    @property
    def kinds(self) -> dict[str, type[nn.Module]]:
        """The class of each part; a T5 without a vocabulary is none."""
        import diffusers
        import transformers

        clip = transformers.CLIPTextModelWithProjection
        t5 = {"text_3": transformers.T5EncoderModel} if "text_3" in self.tokenizers else {}
        return {"denoiser": diffusers.SD3Transformer2DModel, "text": clip, "text_2": clip, **t5,
                "vae": diffusers.AutoencoderKL}

    def load_part(self, part: str, dtype: torch.dtype) -> nn.Module:
        found = self.source.load(self.kinds[part], SPEC.components[part], dtype)
        if part in CLIPS:
            _clip.end_at(found, self.tokenizers[part].eos_token_id)
        for path, layer in found.named_modules() if part == "text_3" and dtype == torch.float16 else ():
            if path.endswith(".wo"):        # these overflow in float16: transformers holds them in float32 too
                layer.float()
        return found

    def denoise(self, x_BChw: Tensor, t_B: Tensor, conditioning: Conditioning, geometry_B6: Tensor) -> Tensor:
        """The network's prediction, (B, C, h, w) float32. It is not told the geometry."""
        transformer = self.parts["denoiser"]
        return transformer(x_BChw.to(transformer.dtype), conditioning.tokens.to(transformer.dtype),
                           conditioning.pooled.to(transformer.dtype), t_B).sample.float()

    def pipeline(self, draws: bool = True):
        """The diffusers pipeline over these very parts; one that draws no pictures has no VAE."""
        import diffusers

        components = dict.fromkeys([*SPEC.components.values(), "tokenizer_3"])
        components |= {SPEC.components[part]: self.parts[part] for part in self.kinds if draws or part != "vae"}
        components |= {tokenizer(SPEC, part): words for part, words in self.tokenizers.items()}
        # A scheduler of its own: sampling rewrites its tables.
        components["scheduler"] = type(self.scheduler).from_config(self.scheduler.config)
        return diffusers.StableDiffusion3Pipeline(**components)


def noising(config) -> RectifiedFlow:
    """The path that a scheduler config describes. Raises FinetuneError for one that is not known here."""
    if "shift" not in config or config.get("use_dynamic_shifting") or config.num_train_timesteps != 1000:
        raise FinetuneError("base.path: its scheduler is not that of Stable Diffusion 3, which has 1000 steps of rectified "
                            "flow and one shift for all sizes (use_dynamic_shifting: false)")
    return RectifiedFlow(config.shift)


def outline(path: str, revision: str | None = None, variant: str | None = None, changes: Changes = Changes()) -> Sd3:
    """The base without its parts and their weights: enough to count tokens and to plan sizes."""
    source = opened(SPEC, path, revision, variant, changes)
    spoken = [*CLIPS, *(["text_3"] if source.has("text_encoder_3") and source.has("tokenizer_3") else [])]
    words = {part: source.tokenizer(tokenizer(SPEC, part)) for part in spoken}
    check_widths(source, SPEC)
    return Sd3(source, {}, words, source.scheduler())


load = partial(base.load, outline)
