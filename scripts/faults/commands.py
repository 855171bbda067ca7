"""SIGKILL before every write-class call of the commands beside train, and after half a write; then the same command again.

    python scripts/faults/commands.py [--command sample] [--sample 40] [--seed 0]

Survived is a kill after which each file has its old content or the new, or is not there, of a folder all files or none; and
after which the command, given again where something is missing, leaves the bytes of the undisturbed one. The table that
`caption` appends to may hold its first lines; of the cache it is what can be read that counts. Prints N/N.
"""

import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])]
import flips  # noqa: E402
from harness import COUNT, KILL, TEAR, Case, arguments, chosen, reference, restarted  # noqa: E402

Content = dict[str, object]


def files(place: Path) -> Content:
    """What lies in OUT under names that are not hidden."""
    every = {p.relative_to(place / "out"): p for p in sorted((place / "out").rglob("*")) if p.is_file()}
    return {str(name): p.read_bytes() for name, p in every.items() if not any(part.startswith(".") for part in name.parts)}


def older(given: Path, out: Path) -> None:
    (out / "pictures").mkdir(parents=True)
    for name in ("pictures/0000-seed1.png", "grid.png"):
        (out / name).write_bytes(b"what was there before")


@dataclass(frozen=True)
class Command:
    line: str                                                       # IN and OUT are folders
    before: Callable[[Path, Path], object] = lambda given, out: out.mkdir(parents=True)        # puts into OUT what is there
    content: Callable[[Path], Content] = files


COMMANDS = {
    "sample": Command("sample --base IN/base --adapter IN/lora.safetensors --prompt circle --steps 1 --seed 1 --count 2 "
                      "--size 32x32 --out OUT/pictures --grid OUT/grid.png --overwrite", older),
    "merge": Command("merge --adapter IN/lora.safetensors --adapter IN/lora.safetensors:0.5 --out OUT/merged.safetensors"),
    "merge into a base": Command("merge --base IN/base --adapter IN/lora.safetensors --out OUT/model"),
    "merge into a file": Command("merge --base IN/base --adapter IN/lora.safetensors --out OUT/model.safetensors"),
    "convert": Command("convert IN/lora.safetensors --to diffusers --out OUT/converted.safetensors"),
    "extract": Command("extract --base IN/base --tuned IN/tuned --rank 2 --out OUT/extracted.safetensors"),
    "resize": Command("resize IN/lora.safetensors --rank 1 --out OUT/resized.safetensors"),
    "caption": Command("caption OUT/pictures --model IN/captioner --tokens 3",
                       lambda given, out: shutil.copytree(given / "pictures", out / "pictures")),
    "preview": Command("preview OUT/run", lambda given, out: shutil.copytree(given / "run", out / "run")),
    "cache": Command("cache IN/lora.yaml", content=flips.values),
}


def captioner(folder: Path) -> None:
    """A GIT of one layer and random weights."""
    import torch
    from transformers import BertTokenizer, GitConfig, GitForCausalLM, GitProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    torch.manual_seed(0)
    net = GitForCausalLM(GitConfig(**small, vocab_size=len(words), bos_token_id=2, eos_token_id=3, pad_token_id=0,
                                   vision_config=small | {"image_size": 32, "patch_size": 16}))
    for weight in net.parameters():     # so that it says something
        torch.nn.init.normal_(weight)
    net.save_pretrained(folder)
    seen = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    GitProcessor(seen, BertTokenizer(str(folder / "vocab.txt"), model_input_names=["input_ids", "attention_mask"])) \
        .save_pretrained(folder)


def main(words: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--command", choices=COMMANDS, action="append", help="all if not given")
    args = parser.parse_args(words)
    restarted()
    survived = 0
    with tempfile.TemporaryDirectory(prefix="commands-") as folder:
        place, kills = Path(folder), []
        reference("lora", place)
        given, run = place / "given", place / "whole" / "run"
        shutil.copy(run / "adapter" / "lora.safetensors", given)
        shutil.copytree(run, given / "run", ignore=shutil.ignore_patterns("*.png"))
        names = args.command or list(COMMANDS)
        if "caption" in names:
            captioner(given / "captioner")
        if "extract" in names:
            undisturbed("merge into a base", place)
            shutil.copytree(place / "whole" / "out" / "model", given / "tuned")
        for name in names:
            wanted, met = undisturbed(name, place)
            kills += [(name, wanted, KILL, k) for k in range(1, len(met) + 1)]
            kills += [(name, wanted, TEAR, k) for k, call in enumerate(met, 1) if call.startswith("write ")]
            print(f"{name}: {len(met)} calls", flush=True)
        kills = [kills[i - 1] for i in chosen(len(kills), args.sample, args.seed)]
        for name in names:
            own = [kill for kill in kills if kill[0] == name]
            good = sum(killed(case_of(name, place, "case"), *kill) for kill in own)
            survived += good
            print(f"{name}: {good}/{len(own)}", flush=True)
    print(f"{survived}/{len(kills)} kills leave whole files, and end with the same bytes")
    return survived < len(kills)


def case_of(name: str, place: Path, folder: str) -> Case:
    """A case of the command, with what is there before it."""
    case = Case(place / folder, place, command=tuple(
        word.replace("IN/", f"{place / 'given'}/").replace("OUT/", f"{place / folder / 'out'}/")
        for word in shlex.split(COMMANDS[name].line)))
    shutil.rmtree(case.place, ignore_errors=True)
    COMMANDS[name].before(place / "given", case.place / "out")
    return case


def undisturbed(name: str, place: Path) -> tuple[Content, list[str]]:
    """What the command leaves, and its calls."""
    case = case_of(name, place, "whole")
    end = case.start(COUNT)
    assert end.code == 0, end.said
    case.import_all()
    return COMMANDS[name].content(case.place), end.calls


def killed(case: Case, name: str, wanted: Content, mode: int, k: int) -> bool:
    content = COMMANDS[name].content
    before = content(case.place)
    first = case.start(mode, k)
    now = content(case.place)
    wrong = [file for file, data in now.items() if data not in (wanted.get(file), before.get(file)) and not (
        file.endswith(".jsonl") and wanted[file].startswith(data))]
    model = {file for file in wanted if file.startswith("model/")}
    if first.code != -signal.SIGKILL:
        why = f"ended with {first.code}: {first.said[-2000:]}"
    elif wrong or 0 < len(model & now.keys()) < len(model):
        why = f"half there: {wrong or model & now.keys()}"
    else:
        again = case.start() if now != wanted else None
        found = content(case.place)
        why = f"then ended with {again.code}: {again.said[-2000:]}" if again and again.code else \
            "" if found == wanted else f"others: {[f for f in wanted | found if wanted.get(f) != found.get(f)]}"
    if why:
        print(f"BAD {name} {'torn' if mode == TEAR else 'before'} {' '.join(first.calls)}: {why}", flush=True)
    return not why


if __name__ == "__main__":
    sys.exit(main())
