"""Inputs that would run code if anything of them were executed, under sys.addaudithook: none fires.

    python scripts/faults/canaries.py [--sample N] [--seed 0]

Each is given to the command that a user would give it to. Fired is a canary that leaves its mark, is looked up by a pickle,
is imported, or starts a process. A first one is executed on purpose, to see that the hook sees. Prints N/N.
"""

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])]
from harness import arguments, recipe  # noqa: E402

FIRED: list[str] = []
PICKLED = ("ckpt", "pt", "pth", "bin", "pkl", "safetensors")


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def watch(event: str, details: tuple) -> None:
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pty.spawn") \
            or event == "pickle.find_class" or event == "import" and "canary" in str(details[0]) \
            or event == "os.mkdir" and str(details[0]).endswith("fired"):
        FIRED.append(f"{event} {details!r}"[:200])


def commands(place: Path) -> dict[str, list[str]]:
    """Name → command line."""
    from finetune.families._source import TINY

    given = recipe(place / "given", "lora")
    payload = pickle.dumps(Evil(place / "fired"))
    module = f"import os\nos.mkdir({str(place / 'fired')!r})\nclass Canary: pass\n"
    train = ["train", str(given), "--run", str(place / "run"), "--set", "train.max_steps=1", "--set", "every.preview=0"]
    found: dict[str, list[str]] = {}

    for suffix in PICKLED:      # adapters and bases
        file = place / f"evil.{suffix}"
        file.write_bytes(payload)
        found |= {f"inspect {suffix}": ["inspect", str(file)], f"verify {suffix}": ["verify", str(file), "--base", "tiny"],
                  f"convert {suffix}": ["convert", str(file), "--to", "kohya", "--out", str(place / "out.safetensors")],
                  f"merge {suffix}": ["merge", "--base", "tiny", "--adapter", str(file), "--out", str(place / "merged")],
                  f"start from {suffix}": [*train, "--set", f"method.start_from={file}"],
                  f"base {suffix}": [*train, "--set", f"base.path={file}"]}

    def base(name: str, change) -> None:
        folder = place / name
        shutil.copytree(TINY, folder)
        change(folder)
        (folder / "canary_module.py").write_text(module)
        found[f"base with {name}"] = [*train, "--set", f"base.path={folder}"]

    def edit(file: str, **values):
        def change(folder: Path) -> None:
            known = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps(known | values))
        return change

    def pickled(part: str, weights: str, name: str):
        def change(folder: Path) -> None:
            for file in (folder / part).glob("*.safetensors"):
                file.unlink()
            (folder / part / name).write_bytes(payload)
        return change

    auto = {"auto_map": {"AutoModel": "canary_module.Canary", "AutoTokenizer": ["canary_module.Canary", None],
                         "AutoConfig": "canary_module.Canary"}}
    base("a pickled unet", pickled("unet", "", "diffusion_pytorch_model.bin"))
    base("a pickle named safetensors", pickled("unet", "", "diffusion_pytorch_model.safetensors"))
    base("a pickled vae", pickled("vae", "", "diffusion_pytorch_model.bin"))
    base("a pickled text encoder", pickled("text_encoder", "", "pytorch_model.bin"))
    base("a custom pipeline", edit("model_index.json", _class_name=["canary_module", "Canary"]))
    base("a custom unet", edit("model_index.json", unet=["canary_module", "Canary"]))
    base("a custom text encoder", edit("model_index.json", text_encoder=["canary_module", "Canary"]))
    base("an auto_map of the unet", edit("unet/config.json", **auto, _class_name="Canary"))
    base("an auto_map of the vae", edit("vae/config.json", **auto, _class_name="Canary"))
    base("an auto_map of the text encoder", edit("text_encoder/config.json", **auto, architectures=["Canary"]))
    base("an auto_map of the tokenizer", edit("tokenizer/tokenizer_config.json", **auto, tokenizer_class="Canary"))
    base("a custom scheduler", edit("scheduler/scheduler_config.json", _class_name="canary_module.Canary"))
    base("an attention hook", edit("unet/config.json", attention_type="canary_module.Canary"))

    for name, text in {        # recipes
        "an object of YAML": "train: !!python/object/apply:os.mkdir [MARK]",
        "a new object of YAML": "train: !!python/object/new:os.mkdir [MARK]",
        "a module of YAML": "train: !!python/module:canary_module",
        "a name of YAML": "train: !!python/name:canary_module.Canary",
        "a caption's attributes": "data: {images: IMAGES, resolution: 32, caption: {template: '{text.__class__.__init__.__globals__}'}}",
        "a merge key": "<<: !!python/object/apply:os.mkdir [MARK]",
    }.items():
        file = place / f"{name}.yaml"
        file.write_text(given.read_text() + text.replace("MARK", str(place / "fired")).replace("IMAGES", str(place)) + "\n")
        found[f"a recipe with {name}"] = ["train", str(file), "--run", str(place / "run")]
    found["an override with YAML"] = [*train, "--set", f"train.seed=!!python/object/apply:os.mkdir ['{place / 'fired'}']"]
    found["an override with Python"] = [*train, "--set", f"train.seed=__import__('os').mkdir('{place / 'fired'}')"]

    def source(name: str, write) -> None:
        folder = place / name
        folder.mkdir()
        write(folder)
        found[f"data as {name}"] = [*train, "--set", f"data.images={folder}"]

    source("pickled pictures", lambda folder: [(folder / f"a.{s}").write_bytes(payload)
                                               for s in ("png", "npy", "npz", "webp")])
    source("a dataset script", lambda folder: (folder / "a dataset script.py").write_text(module))
    source("a pickled table", lambda folder: (folder / "metadata.parquet").write_bytes(payload))
    source("an extension type", lambda folder: extension(folder / "metadata.parquet", payload))
    source("a saved dataset", lambda folder: [(folder / n).write_bytes(payload)
                                              for n in ("dataset_info.json", "state.json", "data.arrow")])
    for name, link in {"a link out": tarfile.SYMTYPE, "a hard link out": tarfile.LNKTYPE, "a traversal": tarfile.REGTYPE,
                       "pickles": b"pickle"}.items():
        with tarfile.open(place / f"{name}.tar", "w") as archive:
            for suffix in ("png", "txt", "pkl", "pyd", "json"):
                member = tarfile.TarInfo(f"{'../../' if link == tarfile.REGTYPE else ''}escaped.{suffix}")
                if link in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                    member.type, member.linkname = link, "/etc/passwd"
                member.size = len(payload) if not member.linkname else 0
                archive.addfile(member, io.BytesIO(payload))
        found[f"a shard with {name}"] = [*train, "--set", f"data.images={place / name}.tar"]
    return found


def extension(path: Path, payload: bytes) -> None:
    """A column of the pickled type that old pyarrow executed (CVE-2023-47248)."""
    import pyarrow as pa
    import pyarrow.parquet

    field = pa.field("text", pa.string(), metadata={"ARROW:extension:name": "arrow.py_extension_type",
                                                    "ARROW:extension:metadata": payload})
    pyarrow.parquet.write_table(pa.table([pa.array(["a"])], pa.schema([field])), path)


def main(words: list[str] | None = None) -> int:
    args = arguments(__doc__).parse_args(words)
    sys.addaudithook(watch)
    with tempfile.TemporaryDirectory(prefix="canaries-") as folder:
        place = Path(folder)
        os.environ |= {"FINETUNE_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1"}
        pickle.loads(pickle.dumps(Evil(place / "fired")))
        assert FIRED and (place / "fired").is_dir(), "the hook sees nothing"
        (place / "fired").rmdir()
        names = list(every := commands(place))
        if args.sample:
            names = random.Random(args.seed).sample(names, args.sample)
        quiet = sum(silent(name, every[name], place) for name in names)
    print(f"{quiet}/{len(names)} canaries are silent")
    return quiet < len(names)


def silent(name: str, command: list[str], place: Path) -> bool:
    from accelerate.state import AcceleratorState

    from finetune.cli import main as finetune

    before, said = {p for p in place.parent.glob("escaped*")}, io.StringIO()
    FIRED.clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    why = ""
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            code = finetune(command)
        except Exception as e:
            code, why = 1, f"a traceback: {type(e).__name__}: {e}"
    fired = [*FIRED, *({p for p in place.parent.glob("escaped*")} - before)] + [place / "fired"] * (place / "fired").exists()
    if fired or why:
        print(f"{'FIRED' if fired else 'CRASH'} {name}: exit {code} {fired} {why}", flush=True)
    shutil.rmtree(place / "run", ignore_errors=True)
    return not fired


if __name__ == "__main__":
    sys.exit(main())
