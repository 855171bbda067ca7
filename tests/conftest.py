"""What the tests share: the bundled base, a few drawn pictures, and runs in this very process."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
signal.signal(signal.SIGINT, signal.default_int_handler)       # a shell's background job ignores it, and so would each test
COLOURS = ["red", "orange", "yellow", "green", "cyan", "blue", "purple"]


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """The user's own cache is not touched, by this process and those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Seven captioned pictures of different sizes: 7 is no multiple of any batch."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, colour in enumerate(COLOURS):
        image = Image.new("RGB", (40 + 3 * i, 36), "white")
        ImageDraw.Draw(image).ellipse([4, 4, 20 + i, 28], fill=colour)
        image.save(folder / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": f"a {colour} circle on white"} for i, colour in enumerate(COLOURS)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def recipe(tmp_path, pictures) -> Path:
    """A LoRA of six steps with everything on that could disturb an exact resume: dropout, accumulation, mid-epoch steps."""
    path = tmp_path / "small.yaml"
    path.write_text(f"""
base: {{family: sd1, path: tiny}}
data: {{images: "{pictures}", resolution: 32, flip: true, caption: {{dropout: 0.2}}}}
method: {{kind: lora, rank: 2, alpha: 1, dropout: 0.1}}
objective: {{weighting: min_snr}}
train: {{max_steps: 6, batch_size: 2, gradient_accumulation: 2, learning_rate: 1e-2, schedule: cosine, warmup_steps: 2, threads: 1}}
every: {{log: 2, checkpoint: 2}}
""")
    return path


@pytest.fixture
def train(monkeypatch):
    """`finetune train` in this process: (recipe, run folder, *arguments) → exit code."""
    from accelerate.state import AcceleratorState

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def call(recipe: Path, run: Path, *arguments: str) -> int:
        from finetune.cli import main

        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            return main(["train", str(recipe), "--run", str(run), *arguments])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    return call


@pytest.fixture
def train_by_two():
    """The same in two processes of `accelerate launch`, which have to end well: (recipe, run folder, *arguments)."""
    def call(recipe: Path, run: Path, *arguments: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                   "--main_process_port", str(port), "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "finetune",
                   "train", str(recipe), "--run", str(run), *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]

    return call


@pytest.fixture(scope="session")
def member(tmp_path_factory):
    """A known model with its real blocks and names, but narrow, random and with the tiny base's words: name → folder."""
    made = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = build_member(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


def build_member(name: str, folder: Path) -> Path:
    import diffusers
    import torch
    import transformers

    from finetune.families._source import quiet
    from finetune.families.base import publish_text_encoder

    quiet()
    parts = json.loads((ROOT / "finetune" / "assets" / "configs" / f"{name}.json").read_text())
    tiny = ROOT / "finetune" / "assets" / "tiny" / "tokenizer"
    widths = {"text_encoder": 32, "text_encoder_2": 64}
    encoders = [part for part in parts if part in widths]
    denoiser = "unet" if "unet" in parts else "transformer"
    if denoiser == "unet":
        blocks = len(parts["unet"]["block_out_channels"])
        heads = parts["unet"]["attention_head_dim"]
        parts["unet"] |= {"block_out_channels": [32, 32, 64, 64][-blocks:], "norm_num_groups": 8, "sample_size": 8,
                          "attention_head_dim": [2, 2, 4, 4][-blocks:] if isinstance(heads, list) else heads,
                          "cross_attention_dim": sum(widths[part] for part in encoders)}
    else:
        both = sum(widths.values())
        parts["transformer"] |= {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16,
                                 "caption_projection_dim": 32, "joint_attention_dim": both, "pooled_projection_dim": both,
                                 "sample_size": 8, "pos_embed_max_size": 16,
                                 "dual_attention_layers": (0,) if name == "sd35-medium" else ()}
    if name.startswith("sdxl"):
        parts["unet"] |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 64,
                          "transformer_layers_per_block": [1, 1, 2]}
    parts["vae"] |= {"block_out_channels": [16, 16, 32, 32][-len(parts["vae"]["block_out_channels"]):], "norm_num_groups": 8,
                     "sample_size": 64}
    torch.manual_seed(0)
    made = {denoiser: getattr(diffusers, parts["model_index"][denoiser][1]).from_config(parts[denoiser]),
            "vae": diffusers.AutoencoderKL.from_config(parts["vae"]),
            **{part: getattr(diffusers, parts[part]["_class_name"]).from_config(parts[part])
               for part in ("scheduler", "low_res_scheduler") if part in parts}}
    for part in encoders:
        tokens = transformers.CLIPTokenizer.from_pretrained(tiny, pad_token=parts[tokenizer(part)]["pad_token"])
        config = transformers.CLIPTextConfig(**parts[part] | {
            "hidden_size": widths[part], "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3,
            "projection_dim": widths[part], "vocab_size": len(tokens), "bos_token_id": tokens.bos_token_id})
        made |= {part: getattr(transformers, parts[part]["architectures"][0])(config), tokenizer(part): tokens}
    extra = {key: value for key, value in parts["model_index"].items() if key.startswith("force")}
    if denoiser == "transformer":       # one member has a T5, the other has not
        torch.nn.init.eye_(made["text_encoder"].text_projection.weight)     # as published: single files have no place for it
        extra = t5(parts["text_encoder_3"], both) if name == "sd35-medium" else {"text_encoder_3": None, "tokenizer_3": None}
    if "low_res_scheduler" in parts:
        extra = {"max_noise_level": parts["model_index"]["max_noise_level"]}
    elif "text_encoder_2" not in encoders:
        extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    getattr(diffusers, parts["model_index"]["_class_name"])(**made, **extra).save_pretrained(folder)
    for part in encoders:
        publish_text_encoder(folder / part)
    return folder


def t5(config: dict, width: int) -> dict:
    """A T5 that knows the letters and a few words, in train mode, where two encodings of a text differ."""
    import transformers

    words = [f"▁{word}" for word in ("a", "red", "blue", "green", "circle", "on", "white")]
    pieces = ["▁", *words, *(chr(i) for i in range(33, 127))]
    tokens = transformers.T5Tokenizer(extra_ids=0, vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0),
                                                          *((piece, -1.0 * len(piece) ** -1) for piece in pieces)])
    config = transformers.T5Config(**config | {"d_model": width, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 2,
                                               "vocab_size": 128})
    return {"text_encoder_3": transformers.T5EncoderModel(config), "tokenizer_3": tokens}


def tokenizer(part: str) -> str:
    return part.replace("text_encoder", "tokenizer")


@pytest.fixture(scope="session")
def streamed():
    """The pictures of a folder as a stream: (folder, resolution, **changes of the view, captions, order, stream) → Stream."""
    from finetune.data.buckets import assign, sizes
    from finetune.data.captions import Captions
    from finetune.data.index import build
    from finetune.data.loader import Stream, View
    from finetune.data.order import Order
    from finetune.data.pictures import Reading
    from finetune.recipe.data import Images

    def make(folder, resolution=16, step=None, size=4, seed=0, template="{text}", dropout=0.0, repeats=1, masks=None,
             **changes):
        index = build([Images(path=str(folder), repeats=repeats)], Reading(), masks, lambda line: None, True)
        assert not [note for note in index.notes if note.fatal], index.notes
        known = sizes(resolution, step) if step else np.array([[resolution] * 2])
        fitted = assign(index.height, index.width, known)
        view = View(**{"reading": Reading(), "random_crop": False, "flip": False, "mask": None, "unmasked": 0.0, "stride": 8}
                    | {key: value for key, value in changes.items() if key in View.__annotations__})
        order = Order(np.unique(fitted, axis=0, return_inverse=True)[1].ravel(), index.repeats, size, seed)
        return Stream(index, fitted, Captions(((template, 1.0),), dropout=dropout), view, order,
                      **{key: value for key, value in changes.items() if key not in View.__annotations__})

    return make
