"""The words of the loss; schema.py has the others."""

from typing import Annotated, Literal

from pydantic import Field

from finetune.recipe.words import NAMED, Fields, Fraction, Kind, Positive, Rate, registered

Part = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(gt=0, lt=1)]


class Path(Kind):
    """A noising process. The base's own is the one it can be sampled with; previews and exports go by that."""

    own = {"ddpm": {"schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction": "epsilon",
                    "zero_snr": False},
           "rf": {"shift": 1.0, "reference": None}, "edm": {"sigma_data": 0.5}}

    kind: Literal["ddpm", "rf", "edm"]
    """ddpm has 1000 steps of noise, rf is rectified flow, edm is Karras' preconditioned network."""
    schedule: Literal["linear", "scaled_linear", "cosine"] | None = None
    """Of ddpm: how the betas grow, scaled_linear if left out; cosine needs no beta_start and beta_end."""
    beta_start: Beta | None = None
    """Of ddpm: the first beta, 0.00085 if left out."""
    beta_end: Beta | None = None
    """Of ddpm: the last beta, 0.012 if left out."""
    prediction: Literal["epsilon", "v_prediction", "sample"] | None = None
    """Of ddpm: what the network predicts, epsilon if left out; sample is the clean picture."""
    zero_snr: bool | None = None
    """Of ddpm: rescale the schedule so that its last timestep is all noise; not for epsilon. false if left out."""
    shift: Rate | None = None
    """Of rf: t becomes shift · t / (1 + (shift − 1) · t); more than 1 is more noise, 1 if left out."""
    reference: Positive | None = None
    """Of rf: the side in pixels that `shift` is for; larger pictures get more, smaller ones less. null: all the same."""
    sigma_data: Rate | None = None
    """Of edm: the deviation of the latents, 0.5 if left out."""

    @classmethod
    def misfit(cls, name: str, value, known: dict) -> str | None:
        if name in ("beta_start", "beta_end") and known.get("schedule") == "cosine" and value != cls.own["ddpm"][name]:
            return "cosine has no betas of its own; leave it out"
        if name == "beta_end" and value and value < (start := known.get("beta_start") or 0):
            return f"wants at least beta_start, which is {start:g}; given {value:g}"
        if name == "zero_snr" and value and known.get("prediction") == "epsilon":
            return "at zero SNR the picture is all noise, and epsilon teaches nothing there; take prediction: v_prediction"


class Timesteps(Kind):
    """How often each noise level is drawn: a law over the way from 0, clean, to 1, noise."""

    own = {"uniform": {}, "logit_normal": {"mean": 0.0, "scale": 1.0}, "mode": {"scale": 1.29}, "cosmap": {},
           "sigmoid": {"scale": 1.0}, "log_normal": {"mean": -1.2, "scale": 1.2}}

    kind: Literal["uniform", "logit_normal", "mode", "cosmap", "sigmoid", "log_normal"] = "uniform"
    """logit_normal: the middle, seldom the ends; sigmoid: the same about 0.5; mode: the middle, with heavy tails; cosmap: as
    the cosine schedule; log_normal: that of σ, for the path edm."""
    mean: float | None = None
    """Of logit_normal, 0 if left out, and log_normal, −1.2: less is cleaner."""
    scale: float | None = None
    """Of logit_normal and sigmoid, 1 if left out, and log_normal, 1.2: the spread. Of mode: −1 to 1.75, from the ends to the
    middle, 1.29 if left out."""
    min: Fraction = 0.0
    """Draw nothing cleaner than this."""
    max: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw nothing noisier than this; the law is laid over what is between."""
    stratified: bool = False
    """Share out the noise levels among the examples of a step, so that losses vary less."""

    @classmethod
    def misfit(cls, name: str, value, known: dict) -> str | None:
        mode = known.get("kind") == "mode"
        if name == "scale" and mode and not -1 <= value <= 1.75:
            return f"wants -1 to 1.75 for mode; given {value:g}"
        if name == "scale" and not mode and value is not None and value <= 0:
            return f"wants more than 0; given {value:g}"
        if name == "max" and value <= known.get("min", 0):
            return f"wants more than min, which is {known['min']:g}; given {value:g}"


class Weighting(Kind):
    """How much each noise level counts."""

    own = {"uniform": {}, "min_snr": {"gamma": 5.0}, "soft_min_snr": {"gamma": 5.0}, "debiased": {},
           "p2": {"gamma": 1.0, "k": 1.0}, "edm": {"sigma_data": 0.5}, "sigma_sqrt": {}, "cosmap": {}}

    kind: Literal["uniform", "min_snr", "soft_min_snr", "debiased", "p2", "edm", "sigma_sqrt", "cosmap"] = "uniform"
    """uniform; min_snr, soft_min_snr and p2, which keep nearly clean pictures from ruling the loss; debiased, which adds to
    noisy ones; edm, sigma_sqrt and cosmap, the words of EDM and SD3. All mean the same for whatever the network predicts."""
    gamma: Rate | None = None
    """Of min_snr and soft_min_snr: the signal-to-noise ratio at which they stop counting more, 5 if left out. Of p2: its
    exponent, 1 if left out."""
    k: Rate | None = None
    """Of p2: the signal-to-noise ratio about which it turns, 1 if left out."""
    sigma_data: Rate | None = None
    """Of edm: the deviation of the latents, 0.5 if left out."""


class Noise(Fields):
    """What is added to the white noise."""

    offset: Annotated[float, Field(ge=0)] = 0.0
    """Strength of an even noise in each channel, about 0.05: dark and bright pictures are learned better."""
    offset_random: bool = False
    """Each example draws its own strength, up to `offset`."""
    pyramid: Fraction = 0.0
    """Strength of each coarser noise beside the next finer one, about 0.3; 0 is none."""
    perturbation: Annotated[float, Field(ge=0)] = 0.0
    """Noise in the picture that the network is not asked for, about 0.1: it forgives errors of sampling."""

    @classmethod
    def misfit(cls, name: str, value, known: dict) -> str | None:
        if name == "offset_random" and value and known.get("offset") == 0:
            return "goes with offset, the most that is drawn, which is 0"


class Loss(Kind):
    """What an error costs."""

    own = {"l2": {}, "l1": {}, "huber": {"c": 0.1, "schedule": "constant"}}

    kind: Literal["l2", "l1", "huber"] = "l2"
    """l2 is the square; l1 the size; huber the square of small errors and the size of large ones, so outliers pull less."""
    c: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of huber: from here an error is large, 0.1 if left out."""
    schedule: Literal["constant", "snr"] | None = None
    """Of huber: constant, or snr, where c rises to 1 on clean pictures. constant if left out."""


class Adversarial(Fields):
    """A discriminator that learns to tell drawings from pictures, and from which the decoder learns to be taken for one."""

    weight: Rate = 0.5
    """How much the decoder is moved by it, beside what all other terms move it."""
    start: Annotated[int, Field(ge=0)] = 0
    """Steps in which the discriminator learns alone, and the decoder from the other terms."""


class Objective(Kind):
    """The loss."""

    own = {"denoise": {"path": None, "timesteps": Timesteps(), "weighting": Weighting(), "noise": Noise(), "loss": Loss()},
           "decode": {"pixels": "l1", "ssim": 0.0, "gradient": 0.0, "lpips": 0.0, "sample": True, "kl": 1e-6,
                      "commitment": 1.0, "adversarial": None}}

    kind: Annotated[str, registered("objectives")] = "denoise"
    """denoise teaches the denoiser to find the noise; decode, of the method vae_decoder, the decoder to draw the picture."""
    path: Annotated[Path | None, NAMED] = None
    """Another noising process than the base's own, such as `{kind: rf, shift: 3.0}`, to train another model from it."""
    timesteps: Annotated[Timesteps | None, NAMED] = None
    """How often each noise level is drawn; `cosmap` alone stands for `{kind: cosmap}`."""
    weighting: Annotated[Weighting | None, NAMED] = None
    """How much each noise level counts; `min_snr` alone stands for `{kind: min_snr}`."""
    noise: Noise | None = None
    """What is added to the white noise, such as `{offset: 0.05}`."""
    loss: Annotated[Loss | None, NAMED] = None
    """What an error costs; `l1` alone stands for `{kind: l1}`."""
    pixels: Literal["l1", "l2"] | None = None
    """Of decode: what an error of a pixel costs, l1 if left out; l2 gains more PSNR, l1 is sharper."""
    ssim: Part | None = None
    """Of decode: weight of 1 − SSIM, the similarity of small windows, such as 0.5; 0 if left out."""
    gradient: Part | None = None
    """Of decode: weight of the error between neighbouring pixels, which sharpens edges, such as 1; 0 if left out."""
    lpips: Part | None = None
    """Of decode: weight of LPIPS, a distance as eyes see it, such as 0.1; 0 if left out. Needs the package lpips, which
    fetches its network at the first use."""
    sample: bool | None = None
    """Of decode: draw the latent from the posterior, as in the VAE's own training; false takes its mean. true if left out."""
    kl: Part | None = None
    """Of decode with a trained encoder: weight of the KL term, as LDM counts it, 1e-6 if left out."""
    commitment: Part | None = None
    """Of decode with a trained encoder and a codebook (VQ): weight of the distance to it, 1 if left out."""

    adversarial: Adversarial | None = None
    """Of decode: a discriminator teaches what errors of pixels do not, sharpness, such as `{start: 500}`."""

    @classmethod
    def misfit(cls, name: str, value, known: dict) -> str | None:
        path = known.get("path")
        if name == "timesteps" and value and value.kind == "log_normal" and (path is None or path.kind != "edm"):
            return "log_normal is a law of σ, which the path edm has; take logit_normal"
