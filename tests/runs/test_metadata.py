"""What an adapter says of itself: enough for the tools that file it, and nothing private."""

import getpass
import json
import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from finetune.header import read_header
from finetune.train.export import public


def test_a_file_is_filed_right_and_keeps_secrets(recipe, train, tmp_path, pictures):
    text = recipe.read_text().replace("caption: {dropout: 0.2}", "caption: {dropout: 0.2, trigger: zkw, "
                                      "template: '{text}, as in /home/alice/secret/dog, hf_abcdefghijklmnopqrst'}")
    recipe.write_text(text)
    shown = "every.preview=2", "preview.prompts=[a red circle]", "preview.steps=2", "preview.thumbnail=true"
    words = [word for value in ("train.max_steps=2", "every.checkpoint=2", *shown) for word in ("--set", value)]
    assert train(recipe, tmp_path / "run", *words) == 0
    said = read_header(tmp_path / "run" / "adapter" / "small.safetensors").metadata
    assert said["ss_base_model_version"] == "sd_v1" and said["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert said["modelspec.trigger_phrase"] == "zkw" and said["ss_output_name"] == "small"
    (folder, tags), = json.loads(said["ss_tag_frequency"]).items()
    assert folder == pictures.name and tags["as in dog"] == 7 and tags["zkw"] == 7, tags
    assert list(json.loads(said["ss_dataset_dirs"])) == [pictures.name]
    assert json.loads(said["ss_bucket_info"])["buckets"]["0"] == {"resolution": [32, 32], "count": 7}
    assert set(json.loads(said["finetune.base"])) >= {"denoiser", "text", "vae"} and len(said["finetune.data"]) >= 32
    kind, _, data = said.pop("modelspec.thumbnail").partition(",")
    picture = Image.open(BytesIO(b64decode(data)))
    assert kind == "data:image/jpeg;base64" and picture.format == "JPEG" and picture.size == (32, 32)
    recipe_said = json.loads(said["finetune.recipe"])
    assert recipe_said["data"]["images"] == [{"path": pictures.name, "repeats": 1}]
    whole = json.dumps(said)
    for secret in ("alice", "hf_abc", str(tmp_path), str(pictures.parent), str(Path.home()) + "/", "secret/"):
        assert secret not in whole, secret
    if len(getpass.getuser()) > 4:
        assert not re.search(rf"\b{getpass.getuser()}\b", whole)


@pytest.mark.parametrize("text, wanted", [
    ("/home/alice/pictures/dog", "dog"), ("/home/alice", "~"), ("C:\\Users\\alice\\dog.png", "dog.png"),
    ("a ../x/y b", "a y b"), ("file:///home/alice/x", "x"),
    ("https://example.org/a/b", "https://example.org/a/b"), ("black and/or white", "black and/or white"),
    ("runwayml/stable-diffusion", "runwayml/stable-diffusion"), ("1/2", "1/2"), ("~bob/x/y", "y"),
    ({"/tmp/a/b": ["/srv/data/c", 3]}, {"b": ["c", 3]}),
])
def test_of_a_path_the_name_is_left(text, wanted):
    assert public(text) == wanted
