import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from finetune import registry
from finetune.errors import FinetuneError
from finetune.recipe import Recipe, difference, dump, load, objective, schema, shipped, training_part

SMALLEST = """\
base: {path: tiny}
data: {images: pictures}
method: {kind: lora}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "dog.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return name

    return write


def problems(path: str, *overrides: str) -> str:
    with pytest.raises(FinetuneError) as caught:
        load(path, overrides)
    return str(caught.value)


def test_defaults(write):
    recipe = load(write(SMALLEST)).recipe
    assert recipe.base.family == "sd1"
    assert recipe.method == (schema.Lora(kind="lora"),)
    assert recipe.export == ("kohya",)
    assert recipe.train.betas == (0.9, 0.999)
    assert recipe.train.ema is None


def test_the_contract_of_the_house(write):
    """The words that users type; a change here needs a line in the changelog."""
    recipe = load(write("""\
base: {family: sd1, path: stable-diffusion-v1-5/stable-diffusion-v1-5, dtype: bfloat16,
       variant: fp16, revision: main}
data:
  images: path/to/pictures
  resolution: 512
  caption: {template: "{text}, in inkwash style", dropout: 0.1}
  flip: true
  crop: random
method:
  - {kind: lora, rank: 16, alpha: 8, dropout: 0.1, targets: [cross_attention, "*.ff.*"], learning_rate: 1e-5}
objective: {kind: denoise, timesteps: uniform, weighting: {kind: min_snr, gamma: 5}}
train: {max_steps: 1000, batch_size: 4, gradient_accumulation: 2, learning_rate: 1e-4, schedule: cosine,
        warmup_steps: 10, optimizer: adamw8bit, weight_decay: 0, betas: [0.9, 0.99], clip_norm: null,
        ema: {decay: 0.99}, mixed_precision: no, seed: 7, gradient_checkpointing: true,
        threads: 2, keep_checkpoints: 3}
preview: {prompts: [a dog], seeds: [1, 2], steps: 10, guidance: 3}
every: {log: 5, preview: 250, checkpoint: 0}
export: [kohya, diffusers]
""")).recipe
    assert recipe.train.learning_rate == 1e-4
    assert recipe.train.mixed_precision == "no"     # YAML 1.2: `no` is a word, not false
    assert recipe.train.clip_norm is None
    assert recipe.method[0].targets == ("cross_attention", "*.ff.*")
    assert recipe.objective.weighting == objective.Weighting(kind="min_snr", gamma=5.0)


def test_what_only_some_variants_have(write):
    def lora(*overrides):
        return load(write(SMALLEST), overrides).recipe.method[0]

    assert (lora().rank, lora().factor) == (16, None)
    assert (lora("method.variant=lokr").rank, lora("method.variant=lokr").factor) == (None, 8)
    for variant, key, value in (("lokr", "rank", 8), ("oft", "dropout", 0.1), ("lora", "factor", 4), ("loha", "lora_plus", 16),
                                ("dora", "max_norm", 1), ("oft", "ranks", "{conv: 3}"), ("lora", "block", 8)):
        with pytest.raises(FinetuneError, match=rf"method.{key}: is of .*, and the variant is {variant}; leave it out"):
            lora(f"method.variant={variant}", f"method.{key}={value}")
    with pytest.raises(FinetuneError, match="method.text: lokr has neither rank nor alpha"):
        lora("method.variant=lokr", "method.text.rank=8")


def test_a_word_of_the_user_in_a_mapping_is_explained(write):
    with pytest.raises(FinetuneError, match="method.ranks.conv: wants a whole number; given 'x'\n    Other ranks"):
        load(write(SMALLEST), ["method.ranks.conv=x"])
    with pytest.raises(FinetuneError, match="method.tokens.: wants a text that is not empty; given ''"):
        load(write(SMALLEST), ["method={kind: embedding, tokens: {'': {init: dog}}}"])


def test_a_weighting_may_be_a_name_alone(write):
    path = write(SMALLEST + "objective: {weighting: min_snr}")
    assert load(path).recipe.objective.weighting.kind == "min_snr"


def test_recipes_are_frozen(write):
    with pytest.raises(ValueError, match="frozen"):
        load(write(SMALLEST)).recipe.train.max_steps = 3


@pytest.mark.parametrize("line, expected", [
    ("train: {learning_rat: 1e-4}", "train.learning_rat: unknown key; did you mean 'learning_rate'?"),
    ("trian: {}", "trian: unknown key; did you mean 'train'?"),
    ("max_steps: 3", "max_steps: unknown key; did you mean 'train.max_steps'?"),
    ("train: {steps: 3}", "train.steps: unknown key; did you mean 'max_steps' or 'data.prior.steps' or 'preview.steps'?"),
    ("zzzz: 3", "zzzz: unknown key\n    keys here: base, data"),
    ("train: {ema: {dekay: 0.9}}", "train.ema.dekay: unknown key; did you mean 'decay'?"),
    ("train: {optimizer: adam}",
     "unknown optimizer 'adam'; did you mean 'adamw'?\n    one of: adamw, adamw8bit"),
    ("train: {mixed_precision: BF-16}", "unknown mixed_precision 'BF-16'; did you mean 'bf16'?"),
    ("train: {mixed_precision: false}", "unknown mixed_precision false\n    one of: no, fp16, bf16"),
    ("objective: {weighting: min-snr}",
     "objective.weighting.kind: unknown kind 'min-snr'; did you mean 'min_snr'?"),
    ("objective: {kind: denoize}", "objective.kind: unknown objective 'denoize'; did you mean 'denoise'?"),
    ("export: [koya]", "export.0: unknown format 'koya'; did you mean 'kohya'?"),
    ("export: kohya", "export: wants a list; given 'kohya'"),
    ("export: []", "export: wants at least one in the list"),
    ("export: [kohya, kohya]", "export: kohya, kohya: each may be named once"),
    ("train: {batch_size: '4'}", "train.batch_size: wants a whole number; given '4'"),
    ("train: {batch_size: 4.0}", "train.batch_size: wants a whole number; given 4.0"),
    ("train: {batch_size: true}", "train.batch_size: wants a whole number; given true"),
    ("train: {batch_size: null}", "train.batch_size: wants a whole number; given null"),
    ("train: {batch_size: 0}", "train.batch_size: wants at least 1; given 0"),
    ("train: {learning_rate: 0}", "train.learning_rate: wants more than 0; given 0"),
    ("train: {learning_rate: .inf}", "train.learning_rate: wants a finite number; given inf"),
    ("train: {learning_rate: fast}",
     "train.learning_rate: wants a number; given 'fast'\n    Peak learning rate."),
    ("train: {betas: [0.9]}", "train.betas.1: missing"),
    ("train: {betas: [0.9, 0.9, 0.9]}", "train.betas: wants at most 2 in the list; given a list"),
    ("train: {ema: true}", "train.ema: wants a mapping of decay; given true"),
    ("train: 5", "train: wants a mapping of max_steps, batch_size"),
    ("train: {seed: -1}", "train.seed: wants at least 0; given -1"),
    ("train: {gradient_checkpointing: yes}", "gradient_checkpointing 'yes'\n    one of: false, true, selective"),
    ("train: {gradient_checkpointing: 1.0}", "train.gradient_checkpointing: wants true, false or a word"),
    ("train: {keep_best: 1}", "train.keep_best: wants true, false or a word"),
    ("train: {keep_best: ''}", "train.keep_best: wants true, false or a word"),
    ("train: {compile: yes}", "wants true or false; given 'yes'"),
    ("train: {max_steps: 5, warmup_steps: 6}",
     "train.warmup_steps: 6 is more than train.max_steps, which is 5"),
    ("every: {preview: 5}", "every: preview: 5 has nothing to sample: preview.prompts is empty"),
    ("every: {log: 0}", "every.log: wants at least 1; given 0"),
    ("preview: {prompts: a dog}", "preview.prompts: wants a list; given 'a dog'"),
    ("preview: {seeds: []}", "preview.seeds: wants at least one in the list"),
    ("train: {seed: !!python/name:os.system x}",
     "train.seed: the tag tag:yaml.org,2002:python/name:os.system"),
    ("train: {seed: !!int abc}", "train.seed: 'abc' cannot be read as int"),
    ("preview: {seeds: &s [1], prompts: *s}", "preview.prompts: an alias cannot stand in a recipe"),
])
def test_one_mistake(write, line, expected):
    said = problems(write(SMALLEST + line))
    assert said.startswith("dog.yaml:4  ")
    assert expected in said
    assert said.count("dog.yaml:") == 1, "one mistake is told once"


@pytest.mark.parametrize("old, new, expected", [
    ("path: tiny", "family: sd15, path: tiny",
     "dog.yaml:1  base.family: unknown family 'sd15'; did you mean 'sd1'?\n    families: sd1"),
    ("path: tiny", "dtype: float32", "dog.yaml:1  base.path: missing\n    `tiny`"),
    ("path: tiny", "path: 5", "dog.yaml:1  base.path: wants text"),
    ("path: tiny", "path: ''", "dog.yaml:1  base.path: wants a text that is not empty"),
    ("{path: tiny}", "tiny", "dog.yaml:1  base: wants a mapping of family, path"),
    ("data: {images: pictures}", "", "dog.yaml:1  data: missing"),
    ("images: pictures", "images: p, resolution: 500",
     "dog.yaml:2  data.resolution: wants a multiple of 8; given 500"),
    ("images: pictures", "images: p, resolution: 8000000000", "data.resolution: wants at most 16384; given 8000000000"),
    ("images: pictures", "images: {path: p, repeats: 3000000000}", "data.images.0.repeats: wants at most 1e+06"),
    ("images: pictures", "images: p, caption: {template: {template: a, weight: 1e308}}",
     "data.caption.template.0.weight: wants at most 1e+06"),
    ("images: pictures", "images: p, caption: {trigger: '  '}", "data.caption.trigger: wants a word"),
    ("images: pictures", "images: p, crop: centre", "unknown crop 'centre'; did you mean 'center'?"),
    ("images: pictures", "images: p, caption: {template: {text}}",
     "dog.yaml:2  data.caption.template: a text with braces needs quotes"),
    ("images: pictures", "images: p, caption: {template: {{text}}}", "a text with braces needs quotes"),
    ("images: pictures", "images: p, caption: {dropout: 2}",
     "data.caption.dropout: wants at most 1; given 2"),
    ("kind: lora", "kind: loar",
     "dog.yaml:3  method.kind: unknown kind 'loar'; did you mean 'lora'?\n    one of: control, embedding, full, lora"),
    ("kind: lora", "rank: 4", "dog.yaml:3  method.kind: missing"),
    ("kind: lora", "kind: lora, rank: 0", "dog.yaml:3  method.rank: wants at least 1; given 0"),
    ("kind: lora", "kind: lora, dropout: 1", "dog.yaml:3  method.dropout: wants less than 1; given 1"),
    ("kind: lora", "kind: lora, targets: all", "dog.yaml:3  method.targets: wants a list; given 'all'"),
    ("kind: lora", "kind: lora, targets: [all, 3]", "dog.yaml:3  method.targets.1: wants text"),
    ("{kind: lora}", "lora", "dog.yaml:3  method: wants a mapping of kind, variant, rank"),
    ("{kind: lora}", "[{kind: lora}, {kind: lora}]",
     "dog.yaml:3  method: lora, lora: each may be named once"),
])
def test_one_mistake_in_what_must_be_there(write, old, new, expected):
    said = problems(write(SMALLEST.replace(old, new)))
    assert expected in said
    assert said.count("dog.yaml:") == 1, "one mistake is told once"


def test_every_problem_is_told_at_its_line_in_order(write):
    said = problems(write("""\
# a comment
base:
  path: tiny
  famly: sd1
method:
  kind: lora
  rank: four
train:
  seed: 1
  optimizer: adam
  seed: 2
"""), "train.batch_size=0", "train.max_step=3")
    places = [line.split("  ")[:2] for line in said.splitlines() if not line.startswith("    ")]
    assert [(where, what.split(":")[0]) for where, what in places] == [
        ("dog.yaml:1", "data"), ("dog.yaml:4", "base.famly"), ("dog.yaml:7", "method.rank"),
        ("dog.yaml:10", "train.optimizer"), ("dog.yaml:11", "train.seed"),
        ("--set train.batch_size=0", "train.batch_size"), ("--set train.max_step=3", "train.max_step")]
    assert "train.seed: written twice; the first is in line 9" in said


@pytest.mark.parametrize("text, expected", [
    ("base: [1\n", "dog.yaml:2  not valid YAML"),
    ("base: 1\n\tdata: 2\n", "dog.yaml:2  not valid YAML"),
    ("base: 1\ndata: a: b\n", "dog.yaml:2  not valid YAML at column 8"),
    ("base: 1\n---\nbase: 2\n", "dog.yaml:2  not valid YAML"),
    ("base: 1\ndata: \0\n", "dog.yaml:2  not valid YAML"),
    ("[" * 5000, "dog.yaml:1  nested too deeply"),
    ("a: &a [*a]", "an alias cannot stand in a recipe"),
    ("", "dog.yaml: is empty"),
    ("# only a comment\n", "dog.yaml: is empty"),
    ("# a list\n- base\n", "dog.yaml:2  a recipe is a mapping"),
    ("just words", "dog.yaml:1  a recipe is a mapping"),
])
def test_a_file_that_is_no_recipe(write, text, expected):
    assert expected in problems(write(text))


def test_a_file_that_cannot_be_read(write, tmp_path):
    write(SMALLEST)
    assert problems("dgo.yaml").startswith("dgo.yaml: there is no such recipe; did you mean 'dog.yaml'?")
    assert problems("nowhere/dog.yaml").startswith("nowhere/dog.yaml: there is no such recipe\n")
    assert problems(".").startswith(".: is a folder")
    (tmp_path / "latin.yaml").write_bytes(SMALLEST.encode() + "preview: {prompts: [größe]}".encode("latin-1"))
    assert problems("latin.yaml").startswith("latin.yaml:4  not UTF-8 text")


def test_overrides(write):
    loaded = load(write(SMALLEST), [
        "train.learning_rate=3e-4", "method.rank=8", "method.0.dropout=0.1",
        "preview.prompts=[a dog, 'a: cat']", "data.images=a=b", "train.ema={decay: 0.9}",
        "train.ema.decay=0.8", "data.images=2024-01-01"])
    recipe = loaded.recipe
    assert recipe.train.learning_rate == 3e-4
    assert (recipe.method[0].rank, recipe.method[0].dropout) == (8, 0.1)
    assert recipe.preview.prompts == ("a dog", "a: cat")
    assert recipe.train.ema.decay == 0.8
    assert recipe.data.images[0].path == "2024-01-01"       # the last one wins, and a date is only a name


@pytest.mark.parametrize("override, expected", [
    ("train.learning_rat=1", "train.learning_rat: unknown key; did you mean 'learning_rate'?"),
    ("trian.seed=1", "trian: unknown key; did you mean 'train'?"),
    ("train.seed=one", "train.seed: wants a whole number; given 'one'"),
    ("train.seed=", "train.seed: wants a whole number; given null"),
    ("train.seed.x=1", "train.seed: wants a whole number; given a mapping"),
    ("base.path.x=1", "base.path.x: base.path is a single value; set it as a whole"),
    ("method.1.rank=1", "method.1.rank: method is a list of 1: name an item from 0 on"),
    ("method.rank=0", "method.rank: wants at least 1; given 0"),
    ("train.seed", "write it as --set key.key=value"),
    ("train..seed=1", "write it as --set key.key=value"),
    ("data.caption.template={text}, in ink", "not valid YAML at column 7"),
    ("train={seed: 1, seed: 2}", "train.seed: written twice"),
])
def test_a_mistake_in_an_override(write, override, expected):
    said = problems(write(SMALLEST), override)
    assert said.startswith(f"--set {override}  {expected}"), said


def test_an_override_of_one_of_several_methods_must_say_which(write):
    path = write(SMALLEST.replace("{kind: lora}", "[{kind: lora}, {kind: lora}]"))
    said = problems(path, "method.rank=3")
    assert "--set method.rank=3  method.rank: the recipe has several methods" in said


def test_places(write):
    text = "base: {path: tiny}\ndata:\n  images: x\nmethod:\n  - kind: lora\n    rank: 4\n"
    loaded = load(write(text), ["train.seed=3"])
    assert loaded.at("data.images") == "dog.yaml:3"
    assert loaded.at("method.rank") == loaded.at("method.0.rank") == "dog.yaml:6"
    assert loaded.at("method.targets") == "dog.yaml:5"      # not written: the place of its method
    assert loaded.at("train.seed") == "--set train.seed=3"
    assert loaded.at("objective.kind") == "dog.yaml:1"


@pytest.mark.parametrize("extra", [[], [
    "data.caption.template='{text}: \"in\" ink #1, é\n no'",
    "preview.prompts=['no', '1', '~', '- x', '', 'a\nb', '😀']",
    "train.learning_rate=1e-7", "method={kind: lora, rank: 3, alpha: 1}", "train.ema={decay: 0.5}",
    "data.images=2024-01-01",
    "export=[diffusers, kohya]", "train.betas=[0, 0.1]"]])
def test_a_dumped_recipe_loads_to_the_same(write, extra):
    recipe = load(write(SMALLEST), extra).recipe
    text = dump(recipe)
    assert load(write(text, "resolved.yaml")).recipe == recipe
    assert dump(load("resolved.yaml").recipe) == text


def test_identity_holds_what_decides_the_numbers_and_nothing_else(write):
    def part(*overrides: str) -> dict:
        return training_part(load(write(SMALLEST), overrides).recipe)

    for watching in ("every.log=3", "export=[diffusers]", "preview.prompts=[a]", "train.keep_checkpoints=9",
                     "train.threads=3", "base.path=elsewhere", "data.images=moved"):
        assert part(watching) == part(), watching
    for deciding in ("train.learning_rate=3e-4", "method.rank=4", "train.max_steps=3", "data.resolution=64",
                     "train.deterministic=true"):
        assert part(deciding) != part(), deciding
    control = "method={kind: control}"
    assert part(control, "data.condition=edges") == part(control, "data.condition=moved")
    for name, content in (("one", b"1"), ("two", b"2"), ("moved", b"1")):
        Path(name).write_bytes(content)
    one, two, moved = (part(f"method.start_from={name}") for name in ("one", "two", "moved"))
    assert one == moved and one != two and "nowhere" in str(part("method.start_from=nowhere"))
    assert difference(part(), part("train.learning_rate=3e-4", "method.rank=4")) == [
        "method.0.rank: 16 -> 4", "train.learning_rate: 0.0001 -> 0.0003"]
    assert difference({"a": 1}, {"b": 1}) == ["a: 1 -> absent", "b: absent -> 1"]


MODELS = [value for value in vars(schema).values() if isinstance(value, type) and issubclass(value, BaseModel)
          and value is not BaseModel]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_field_is_explained(model):
    for name, field in model.model_fields.items():
        assert field.description, f"{model.__name__}.{name} has no docstring"


def test_the_schema_and_the_registry_know_the_same_methods(write):
    owed = {"embedding": ["method.tokens={sks-dog: {init: dog}}"], "control": ["data.condition=boxes"]}
    for name in registry.names("methods"):
        assert load(write(SMALLEST), [f"method={{kind: {name}}}", *owed.get(name, [])]).recipe.method[0].kind == name
    assert f"one of: {', '.join(registry.names('methods'))}" in problems(write(SMALLEST), "method.kind=x")


def test_the_export_follows_from_family_and_method(write):
    found = {name: load(write(SMALLEST), [f"base.family={family}", f"method={method}"]).recipe.export[0]
             for name, family, method in (
        ("lora", "sd1", "{kind: lora}"), ("full", "sd1", "{kind: full}"), ("sd3", "sd3", "{kind: lora, variant: rslora}"),
        ("dora", "sd3", "{kind: lora, variant: dora}"), ("vae", "sd3", "{kind: vae_decoder}"))}
    assert found == {"lora": "kohya", "full": "diffusers", "sd3": "diffusers", "dora": "kohya", "vae": "kohya"}


@pytest.mark.parametrize("path", shipped.paths(), ids=lambda path: path.stem)
def test_shipped_recipes_are_right_and_open_with_their_command(path):
    assert isinstance(load(path).recipe, Recipe)
    assert re.match(rf"accelerate launch .*-m finetune train recipes/{path.name}", shipped.header(path)[0])


@pytest.mark.parametrize("method, expected", [
    ("{kind: embedding}", "method.tokens: missing\n    What is learned"),
    ("{kind: embedding, tokens: {}}", "method.tokens: wants at least one token"),
    ("{kind: embedding, tokens: {a: {}}}", "method.tokens.a: wants init, the words that it begins as"),
    ("{kind: embedding, tokens: {a: {innit: x}}}",
     "method.tokens.a.innit: unknown key; did you mean 'init'?\n    keys here: init, vectors"),
    ("{kind: embedding, tokens: {a: {init: x, vectors: 0}}}", "method.tokens.a.vectors: wants at least 1; given 0"),
    ("{kind: embedding, tokens: {a: per_valu}}",
     "method.tokens.a: wants a mapping of init, vectors, column; given 'per_valu'"),
    ("{kind: embedding, tokens: {a: per_value}, targets: [all]}",
     "method.targets: unknown key; did you mean 'method.text.targets'?"),
    ("[{kind: embedding, tokens: {a: per_value}}, {kind: lora, rnk: 3}]", "method.1.rnk: unknown key; did you mean 'rank'?"),
    ("[{kind: embedding, tokens: {a: per_value}}, {}]", "method.1.kind: missing"),
])
def test_a_mistake_in_one_of_several_methods(write, method, expected):
    said = problems(write(SMALLEST.replace("{kind: lora}", method)))
    assert said.startswith("dog.yaml:3  ") and expected in said and said.count("dog.yaml:") == 1


def test_a_token_for_each_value_may_be_a_word(write):
    words = SMALLEST.replace("{kind: lora}", "{kind: embedding, tokens: {colour: per_value, dog: {init: dog}}}")
    method = load(write(words)).recipe.method[0]
    assert {name: (token.column, token.init, token.vectors) for name, token in method.tokens.items()} == {
        "colour": ("colour", None, 1), "dog": (None, "dog", 1)}
