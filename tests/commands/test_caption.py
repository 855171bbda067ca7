"""`finetune caption` with small models of random weights: what they say does not matter, where it goes does."""

import shutil

import pytest
import torch

from finetune.cli import main
from finetune.data.index import build
from finetune.data.pictures import Reading
from finetune.families._source import TINY
from finetune.recipe.data import Images


@pytest.fixture(scope="module", params=["blip", "git"])
def model(request, tmp_path_factory) -> str:
    """As published: config, safetensors, words and image processor."""
    import transformers
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp(request.param)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", *"abcdefghijklmnopqrstuvwxyz", "red", "circle",
             "white"]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokens = transformers.BertTokenizer(str(folder / "vocab.txt"), bos_token="[DEC]",
                                        model_input_names=["input_ids", "attention_mask"])
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    of = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    with torch.random.fork_rng(), torch.no_grad():
        if request.param == "blip":
            seen = BlipImageProcessorPil(size={"height": 32, "width": 32})
            processor = transformers.BlipProcessor(seen, tokens)
            net = transformers.BlipForConditionalGeneration(transformers.BlipConfig(
                text_config=small | of | {"vocab_size": len(words), "encoder_hidden_size": 16, "projection_dim": 16},
                vision_config=small | {"image_size": 32, "patch_size": 16}, projection_dim=16))
        else:
            seen = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
            processor = transformers.GitProcessor(seen, tokens)
            net = transformers.GitForCausalLM(transformers.GitConfig(
                **small, **(of | {"bos_token_id": 2}), vocab_size=len(words),
                vision_config=small | {"image_size": 32, "patch_size": 16}))
        torch.manual_seed(1)        # here: how much was drawn before is the library's business
        for weight in net.parameters():     # so that it says more than one thing
            if weight.ndim > 1:
                weight.normal_()
    net.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def columns(folder) -> list[dict]:
    index = build([Images(path=str(folder))], Reading(), None, lambda line: None, True)
    assert not [note for note in index.notes if note.fatal]
    return [index.columns(i) for i in range(len(index))]


def test_captions_beside_human_ones(model, pictures, tmp_path, capsys):
    folder = shutil.copytree(pictures, tmp_path / "mine")
    (folder / "6.png").rename(folder / "sechs é.png")
    kept = "".join(line for line in (folder / "metadata.jsonl").read_text().splitlines(keepends=True) if "6.png" not in line)
    (folder / "metadata.jsonl").write_text(kept)
    (folder / "sechs é.txt").write_text("a purple circle")
    command = ["caption", str(folder), "--model", model, "--tokens", "5", "--quiet"]
    assert main(command) == 0 and "7 pictures captioned" in capsys.readouterr().out
    whole = (folder / "synthetic.jsonl").read_text()
    assert (folder / "metadata.jsonl").read_text() == kept and (folder / "sechs é.txt").read_text() == "a purple circle"
    found = columns(folder)
    assert all(set(row) == {"text", "synthetic"} for row in found) and found[6]["text"] == "a purple circle"
    assert len({row["synthetic"] for row in found}) > 1

    # Killed within the line of the fourth picture
    lines = whole.splitlines(keepends=True)
    (folder / "synthetic.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    assert main(command) == 0 and "4 pictures captioned" in capsys.readouterr().out
    assert (folder / "synthetic.jsonl").read_text() == whole
    (folder / "synthetic.jsonl").write_text(whole[:-1])       # as an editor may leave it
    assert main([*command[:3], "no/such/model"]) == 0 and "0 pictures captioned" in capsys.readouterr().out       # not needed

    (folder / "synthetic.jsonl").unlink()
    assert main([*command, "--prompt", "a red"]) == 0
    begins = [row["synthetic"].startswith("a red") for row in columns(folder)]
    assert all(begins) if "blip" in model else len(begins) == 7


@pytest.mark.parametrize("wrong, said", [
    ({"--model": "no/such/model"}, "no/such/model: cannot be used"),
    ({"--model": str(TINY / "text_encoder")}, "an image-to-text model"),
    ({"--tokens": "0"}, "at least 1"), ({"pictures": "nowhere"}, "no folder")])
def test_what_cannot_be_done(wrong, said, pictures, tmp_path, capsys):
    folder = shutil.copytree(pictures, tmp_path / "mine")
    words = {"pictures": str(folder), "--model": "no/such/model", "--tokens": "5"} | wrong
    assert main(["caption", words.pop("pictures"), *(word for pair in words.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and not (folder / "synthetic.jsonl").exists()
