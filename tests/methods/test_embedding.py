"""Learned tokens: how the tokenizer and the table take them, and what becomes of their names."""

import pytest
import torch

from finetune import registry, tokens
from finetune.artifact import Artifact, read_header
from finetune.errors import FinetuneError
from finetune.formats import _tokens
from finetune.formats import base as formats
from finetune.formats._identify import identify

ROWS = {"sks-dog": {"text": torch.full((3, 128), 0.1)}, "sks-hut": {"text": torch.full((1, 128), 0.2)}}


@pytest.fixture
def family():
    return registry.find("families", "sd1").load("tiny")


def test_a_token_of_several_vectors_is_spelled_out_as_diffusers_does(family):
    prompts = ["a Sks-Dog's house, sks-hut", "(sks-dog) and sks-dogs", "asks-dog", "a red circle"]
    before = family.tokenizers["text"], family.parts["text"].get_input_embeddings()
    with tokens.added(family, ROWS):
        pieces = [family.pieces(prompt)[0][0] for prompt in prompts]
        states = family.encode_text([prompts[3], "a sks-dog and a sks-hut"]).tokens
        again = family.pipeline().encode_prompt([prompts[3], "a sks-dog and a sks-hut"], "cpu", 1, False)[0]
    assert pieces[0][1:4] == [950, 951, 952] and pieces[0][-1] == 953
    assert pieces[1].count(950) == 1 and 950 not in pieces[2]
    assert torch.equal(states, again)
    assert (family.tokenizers["text"], family.parts["text"].get_input_embeddings()) == before and family.learned is None
    assert torch.equal(family.encode_text([prompts[3]]).tokens, states[:1])


def test_the_table_has_no_gradient_and_its_rows_begin_as_the_words(family):
    table = family.parts["text"].get_input_embeddings()
    red, circle = table.weight[family.tokenizers["text"]("red circle", add_special_tokens=False).input_ids]
    assert torch.allclose(tokens.initial(family.tokenizers["text"], table, "red circle", 1)[0], (red + circle) / 2)
    assert torch.equal(tokens.initial(family.tokenizers["text"], table, "red circle", 3), torch.stack([red, circle, red]))
    learned = tokens.extend(family, ROWS)
    family.encode_text(["a sks-dog"]).tokens.sum().backward()
    rows = learned.tables["text"].learned
    assert rows.grad[:3].any(1).all() and not rows.grad[3:].any()
    assert [p for p in family.parts["text"].parameters() if p.requires_grad or p.grad is not None] == [rows]


@pytest.mark.parametrize("names, why", [
    ({"Dog": 1}, "small letters"), ({"a b": 1}, "small letters"), ({"../x": 1}, "small letters"), ({"_x": 1}, "small letters"),
    ({"狗" * 80: 1}, "200 bytes"),
    ({"re": 1}, "own vocabulary"), ({"sks": 2, "sks-dog": 1}, "holds 'sks'"), ({"sks": 1, "sks_1": 1}, "holds 'sks'"),
])
def test_names_that_would_be_mistaken_are_refused(family, names, why):
    with pytest.raises(FinetuneError, match=why):
        tokens.extend(family, {name: {"text": torch.zeros(count, 128)} for name, count in names.items()})
    assert family.learned is None


@pytest.mark.parametrize("form, key", [("kohya", "emb_params"), ("diffusers", "sks-dog")])
def test_files_hold_one_tensor_and_are_known_again(family, tmp_path, form, key):
    artifact = Artifact("embedding", "sd1", {"text.embedding": torch.randn(2, 128)}, {"ss_output_name": "sks-dog"})
    path = tmp_path / f"sks-dog.{form}.safetensors"
    formats.save(artifact, path, form, family.spec)
    header = read_header(path)
    facts = identify(header)
    assert list(header.tensors) == [key] and (facts["kind"], facts["format"], facts["family"]) == ("embedding", form, "sd1")
    back = formats.load(path, family.spec)
    assert back.metadata["ss_output_name"] == _tokens.token(path) == "sks-dog"
    assert torch.equal(back.tensors["text.embedding"], artifact.tensors["text.embedding"])


def test_two_encoders_have_a_tensor_each():
    from dataclasses import replace

    one = registry.find("families", "sd1").SPEC
    spec = replace(one, components=one.components | {"text_2": "text_encoder_2"})
    artifact = Artifact("embedding", "sd1", {"text.embedding": torch.ones(2, 8), "text_2.embedding": torch.ones(2, 12)},
                        {"ss_output_name": "x"})
    for form in ("kohya", "diffusers"):
        found, metadata = registry.find("formats", form).encode(artifact, spec)
        assert {name: tuple(t.shape) for name, t in found.items()} == {"clip_l": (2, 8), "clip_g": (2, 12)}
        again = registry.find("formats", "kohya").decode(found, metadata, spec).tensors
        assert all(torch.equal(again[name], t) for name, t in artifact.tensors.items())


def test_what_others_write_is_read(tmp_path, family):
    from safetensors.torch import save_file

    save_file({"<cat>": torch.ones(768)}, tmp_path / "my-cat.safetensors")
    assert formats.load(tmp_path / "my-cat.safetensors", family.spec).tensors["text.embedding"].shape == (1, 768)
    save_file({"emb_params": torch.ones(2, 1024)}, tmp_path / "sd2.safetensors")
    with pytest.raises(FinetuneError, match="is for sd2"):
        formats.load(tmp_path / "sd2.safetensors", family.spec)
    save_file({"emb_params": torch.ones(2, 3, 4)}, tmp_path / "odd.safetensors")
    with pytest.raises(FinetuneError, match="no token's vectors"):
        formats.load(tmp_path / "odd.safetensors", family.spec)
