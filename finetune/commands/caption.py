"""Caption pictures with a model, beside the captions that they have.

What it says is the column `synthetic`, in a table of its own, synthetic.jsonl."""

import json
import os
import sys
from pathlib import Path

from finetune.disk import writing
from finetune.errors import FinetuneError, refuse

ADVICE = ("an image-to-text model of transformers is needed, with its weights as safetensors: a local folder or a hub id, "
          "such as Salesforce/blip-image-captioning-large")


def add_arguments(parser) -> None:
    parser.add_argument("pictures", type=Path, help="a folder of pictures; what has a synthetic caption keeps it")
    parser.add_argument("--model", required=True, metavar="PATH|ID", help=ADVICE)
    parser.add_argument("--prompt", metavar="WORDS", help="what the model is told: how captions begin (of BLIP), the task (of "
                        "Florence-2: <CAPTION>), or the question to one that answers, which is asked for one sentence if it "
                        "is not given")
    parser.add_argument("--tokens", type=int, default=50, metavar="N", help="of a caption at the most, 50 if not given")


def run(args) -> int:
    """The same command goes on after an interruption: each caption is on disk once it is made."""

    from tqdm import tqdm

    from finetune.commands.new import look
    from finetune.data import pictures
    from finetune.data.folders import SYNTHETIC, Folder

    if args.tokens < 1:
        raise FinetuneError(f"--tokens {args.tokens}: at least 1")
    out = args.pictures / os.fsdecode(SYNTHETIC)
    with writing(f"{out}:"):
        if out.exists() and (last := out.read_bytes().rpartition(b"\n")[2]):
            try:
                json.loads(last)
                with open(out, "a") as file:        # by hand, without its end
                    file.write("\n")
            except ValueError:                      # that the power cut
                os.truncate(out, out.stat().st_size - len(last))
        index = look(args.pictures, lambda line: print(line, file=sys.stderr))
        if not isinstance(index.places[0], Folder):
            raise FinetuneError(f"{args.pictures}: captions are written into a folder of pictures, and this is "
                                f"{index.places[0].kind}")
        names = [os.fsdecode(name) for name in index.table["name"].to_pylist()]
        refuse([f"{index.name(i)}: its name is not UTF-8, so no table can name it" for i, name in enumerate(names)
                if name.encode(errors="ignore").decode() != name])
        todo = [i for i in range(len(index)) if "synthetic" not in index.columns(i)]
        captioner, made = Captioner(args.model, args.prompt, args.tokens) if todo else None, 0
        with open(out, "a", encoding="utf-8") as file:
            for i in tqdm(todo, unit="img"):
                if caption := captioner.caption(pictures.read(index.read(i), index.name(i))):
                    print(json.dumps({"file_name": names[i], "synthetic": caption}, ensure_ascii=False), file=file, flush=True)
                    made += 1
    silent = f", of {len(todo) - made} it said nothing" if made < len(todo) else ""
    print(f"{made} pictures captioned in {out}, {len(index) - len(todo)} were before{silent}\n"
          "a template names them {synthetic}")
    return 0


class Captioner:
    """A model that says what it sees, the same each time."""

    def __init__(self, path: str, prompt: str | None, tokens: int):
        """Raises FinetuneError for a model that cannot be loaded."""
        import transformers

        from finetune import device
        from finetune.metrics._eye import opened, refusing

        self.path, self.tokens, self.options = path, tokens, {"text": prompt} if prompt else {}
        with refusing(path, ADVICE):
            self.model = opened(transformers.AutoModelForImageTextToText, path, "auto").to(device.best())
            self.processor = transformers.AutoProcessor.from_pretrained(path, backend="pil")
            self.answers = bool(getattr(self.processor, "chat_template", None))
            if self.answers:
                question = {"type": "text", "text": prompt or "Describe this picture in one sentence."}
                self.options["text"] = self.processor.apply_chat_template(
                    [{"role": "user", "content": [{"type": "image"}, question]}], add_generation_prompt=True)

    def caption(self, picture) -> str:
        """On one line. Raises FinetuneError for a model that wants other words."""
        import torch

        from finetune.metrics._eye import refusing

        with torch.inference_mode(), refusing(self.path, "it may want other words: --prompt"):
            seen = self.processor(images=picture, return_tensors="pt", **self.options).to(self.model.device, self.model.dtype)
            said = self.model.generate(**seen, max_new_tokens=self.tokens, do_sample=False)
            begin = seen["input_ids"].shape[1] if self.answers else 0       # the question is no part of the caption
            return " ".join(self.processor.batch_decode(said[:, begin:], skip_special_tokens=True)[0].split())
