"""train.optimizer and train.schedule: what belongs together, what does not, and what is meant when nothing is written."""

from typing import get_args

import pytest

from finetune.errors import FinetuneError
from finetune.optim.schedule import SHAPES, factor
from finetune.recipe import dump, load
from finetune.recipe.train import Schedule, Train

SMALLEST = "base: {path: tiny}\ndata: {images: pictures}\nmethod: {kind: lora}\n"


@pytest.fixture
def recipe(tmp_path):
    def read(train: str, *overrides: str):
        path = tmp_path / "dog.yaml"
        path.write_text(f"{SMALLEST}train: {train}\n")
        return load(path, overrides).recipe
    return read


def test_nothing_written_is_what_it_was(recipe):
    train = recipe("{}").train
    assert (train.optimizer, train.learning_rate, train.betas, train.weight_decay) == ("adamw", 1e-4, (0.9, 0.999), 0.01)
    assert train.schedule == Schedule(kind="constant")


@pytest.mark.parametrize("optimizer, learning_rate, betas", [
    ("adamw8bit", 1e-4, (0.9, 0.999)), ("lion", 1e-4, (0.9, 0.99)), ("lion8bit", 1e-4, (0.9, 0.99)),
    ("adafactor", 1e-4, None), ("prodigy", 1.0, (0.9, 0.999)),
    ("schedule_free_adamw", 1e-4, (0.9, 0.999)), ("sgd", 1e-4, None)])
def test_what_is_left_out_is_the_optimizers_own(recipe, optimizer, learning_rate, betas):
    train = recipe(f"{{optimizer: {optimizer}}}").train
    assert (train.learning_rate, train.betas) == (learning_rate, betas)
    written = recipe(f"{{optimizer: {optimizer}, learning_rate: 0.5, betas: null}}").train
    assert (written.learning_rate, written.betas) == (0.5, betas)


@pytest.mark.parametrize("train", [
    "{optimizer: sgd}", "{optimizer: prodigy, schedule: cosine}", "{optimizer: lion, betas: [0.8, 0.9]}", "{schedule: wsd}",
    "{schedule: {kind: cosine_restarts, cycles: 3, floor: 0.1}}", "{schedule: {kind: polynomial, power: 3}}"])
def test_what_is_dumped_is_loaded_again(recipe, tmp_path, train):
    first = recipe(train)
    (tmp_path / "again.yaml").write_text(dump(first))
    assert load(tmp_path / "again.yaml").recipe == first


def test_a_schedule_is_a_name_or_a_mapping(recipe):
    assert recipe("{schedule: cosine}").train.schedule == Schedule(kind="cosine")
    assert recipe("{schedule: {kind: cosine_restarts, cycles: 5}}").train.schedule.cycles == 5
    assert recipe("{schedule: wsd}").train.schedule.decay == 0.2
    assert recipe("{}", "train.schedule={kind: linear, floor: 0.2}").train.schedule.floor == 0.2


@pytest.mark.parametrize("kind", SHAPES)
def test_every_schedule_of_a_recipe_is_a_schedule(recipe, kind):
    schedule = recipe(f"{{schedule: {kind}}}").train.schedule
    assert factor(step=0, max_steps=10, warmup_steps=0, **schedule.model_dump(exclude_none=True)) == 1


def test_the_recipe_knows_the_same_names():
    assert get_args(Schedule.model_fields["kind"].annotation) == tuple(SHAPES)
    assert Schedule.own.keys() == SHAPES.keys()
    assert {name for own in Schedule.own.values() for name in own} < Schedule.model_fields.keys()
    assert "optimizer" in Train.model_fields


@pytest.mark.parametrize("train, expected", [
    ("{optimizer: sgd, betas: [0.9, 0.999]}", "train.betas: sgd has none; leave it out"),
    ("{optimizer: adafactor, betas: [0.9, 0.999]}", "train.betas: adafactor has none; leave it out"),
    ("{optimizer: schedule_free_adamw, betas: [0, 0.9]}", "train.betas: the first is more than 0"),
    ("{optimizer: schedule_free_adamw, schedule: cosine}", "train.schedule: cosine does not fit schedule_free_adamw, which"),
    ("{optimizer: torch.optim.Adam}", "train.optimizer: unknown optimizer 'torch.optim.Adam'"),
    ("{optimizer: lion16bit, betas: [0.9, 0.9]}", "train.optimizer: unknown optimizer 'lion16bit'; did you mean 'lion8bit'"),
    ("{schedule: cosin}", "train.schedule.kind: unknown kind 'cosin'; did you mean 'cosine'"),
    ("{schedule: {kind: cosin, cycles: 3}}", "train.schedule.kind: unknown kind 'cosin'; did you mean 'cosine'"),
    ("{schedule: 3}", "train.schedule: wants a mapping of kind, cycles, power, decay, floor; given 3"),
    ("{schedule: {kind: cosine, cycles: 3}}", "train.schedule.cycles: is of cosine_restarts, and the schedule is cosine"),
    ("{schedule: {kind: linear, power: 2}}", "train.schedule.power: is of polynomial, and the schedule is linear"),
    ("{schedule: {decay: 0.5}}", "train.schedule.decay: is of wsd, and the schedule is constant"),
    ("{schedule: {kind: constant, floor: 0.1}}", "train.schedule.floor: constant does not fall"),
    ("{schedule: {kind: wsd, decay: 0}}", "train.schedule.decay: wants more than 0; given 0"),
    ("{schedule: {kind: wsd, decay: 1.5}}", "train.schedule.decay: wants at most 1; given 1.5"),
    ("{schedule: {kind: linear, floor: 1.0}}", "train.schedule.floor: wants less than 1; given 1.0"),
    ("{schedule: {kind: polynomial, power: 0}}", "train.schedule.power: wants more than 0; given 0"),
    ("{schedule: {kind: cosine_restarts, cycles: 0}}", "train.schedule.cycles: wants at least 1; given 0"),
    ("{schedule: {kind: cosine, min_factor: 0.1}}", "train.schedule.min_factor: unknown key"),
    ("{max_steps: 9, warmup_steps: 4, schedule: {kind: cosine_restarts, cycles: 6}}",
     "train.schedule: 6 cycles do not fit in the 5 steps after the warm-up"),
    ("{gradient_release: true}", "train.gradient_release: clip_norm measures the whole gradient"),
    ("{gradient_release: true, clip_norm: null, gradient_accumulation: 2, optimizer: prodigy}",
     "train.gradient_release: gradient_accumulation above 1 sums up and prodigy steps by the whole gradient"),
    ("{max_steps: 0, schedule: {kind: cosine_restarts, cycles: 6}}", "train.max_steps: wants at least 1; given 0"),
])
def test_one_mistake(recipe, train, expected):
    with pytest.raises(FinetuneError) as caught:
        recipe(train)
    assert expected in str(caught.value)
    assert str(caught.value).count("dog.yaml:") == 1, "one mistake is told once"


def test_released_gradients_are_of_one_batch(recipe):
    with pytest.raises(FinetuneError, match="gradient_release: data.prior adds a batch to each step"):
        recipe("{gradient_release: true, clip_norm: null}", "data.prior={prompt: a dog}")


def test_weights_in_bfloat16_are_not_trained_with_scaled_gradients(recipe):
    with pytest.raises(FinetuneError, match="mixed_precision: fp16 scales gradients, which weights in base.dtype: bfloat16"):
        recipe("{mixed_precision: fp16}", "method.kind=full", "base.dtype=bfloat16")


def test_what_is_compiled_is_not_selective(recipe):
    with pytest.raises(FinetuneError, match="compile: is not proven to train the same with gradient_checkpointing: selective"):
        recipe("{compile: true, gradient_checkpointing: selective}")
