"""Held-out pictures: a share that stays put, or a list that is followed to the letter."""

import numpy as np
import pytest
from PIL import Image

from finetune.data.index import build
from finetune.data.pictures import Reading
from finetune.data.split import split
from finetune.errors import FinetuneError
from finetune.recipe.data import Images

HOW = Reading()


def picture(seed: int, side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (6, 6, 3)).astype(np.uint8)).resize((side, side))


def indexed(*folders):
    return build([Images(path=str(folder)) for folder in folders], HOW, None, lambda line: None, True)


def names(index) -> set[str]:
    return {index.name(i).rsplit("/", 1)[1] for i in range(len(index))}


@pytest.fixture
def folder(tmp_path):
    """Twenty pictures."""
    (tmp_path / "pictures").mkdir()
    for n in range(20):
        picture(n).save(tmp_path / "pictures" / f"{n:02}.png")
    return tmp_path / "pictures"


def drawn(folder, fraction, seed=0):
    train, held = split(indexed(folder), fraction, None, seed, HOW)
    assert not names(train) & names(held) and len(train) + len(held) == len(list(folder.iterdir()))
    return names(held)


@pytest.mark.parametrize("fraction, count", [(0.1, 2), (0.25, 5), (0.26, 5), (0.5, 10), (0.001, 1), (0.999, 19)])
def test_the_share_is_as_near_as_possible_and_no_side_is_empty(folder, fraction, count):
    assert len(drawn(folder, fraction)) == count


def test_another_seed_draws_others_and_a_larger_share_holds_the_smaller_one(folder):
    assert len({frozenset(drawn(folder, 0.25, seed)) for seed in range(4)}) == 4
    assert drawn(folder, 0.1) < drawn(folder, 0.25) < drawn(folder, 0.5)


def test_more_pictures_and_other_names_leave_it_as_it_is(folder):
    before = drawn(folder, 0.2)
    picture(100).save(folder / "0.png")         # before all others
    after = drawn(folder, 0.2)
    assert len(before ^ after - {"0.png"}) <= 1
    for file in sorted(folder.iterdir()):
        file.rename(folder / f"z{file.name}")
    assert drawn(folder, 0.2) == {f"z{name}" for name in after}


def test_copies_stay_together(folder):
    for n in range(10):
        picture(n).save(folder / f"{n:02} copy.jpg", quality=80)
        (folder / f"{n:02} again.png").write_bytes((folder / f"{n:02}.png").read_bytes())
    for seed in range(5):
        held = drawn(folder, 0.3, seed)
        assert 11 <= len(held) <= 13
        for n in range(10):
            assert len(held & {f"{n:02}.png", f"{n:02} copy.jpg", f"{n:02} again.png"}) in (0, 3)


def test_one_picture_alone_cannot_be_split(tmp_path):
    for n in range(3):
        picture(0).save(tmp_path / f"{n}.png", compress_level=n)
    with pytest.raises(FinetuneError, match="^data.validation: of pictures that all show the same"):
        split(indexed(tmp_path), 0.5, None, 0, HOW)


def listed(index, tmp_path, text) -> set[str]:
    (tmp_path / "held.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    train, held = split(index, None, str(tmp_path / "held.txt"), 0, HOW)
    assert len(train) + len(held) == len(index)
    return names(held)


def test_a_file_names_them_by_any_part_of_the_path(folder, tmp_path):
    index = indexed(folder)
    assert listed(index, tmp_path, f"03.png\r\n\n  pictures/04.png \n./05.png\n{folder}/06.png\n03.png") == {
        "03.png", "04.png", "05.png", "06.png"}
    assert listed(index, tmp_path, "\ufeff01.png") == {"01.png"}


def test_a_name_in_several_folders_wants_more_of_the_path(folder, tmp_path):
    (folder / "more").mkdir()
    picture(50).save(folder / "more" / "03.png")
    index = indexed(folder)
    with pytest.raises(FinetuneError, match=r"held.txt:1  '03.png' is .*/03.png or .*/03.png; write more of the path"):
        listed(index, tmp_path, "03.png")
    (tmp_path / "held.txt").write_text("more/03.png")
    _, held = split(index, None, str(tmp_path / "held.txt"), 0, HOW)
    assert [held.name(i) for i in range(len(held))] == [f"{folder}/more/03.png"]


@pytest.mark.parametrize("text, said", [
    ("00.png\n21.png\n", "held.txt:2  there is no picture '21.png'; did you mean '"), ("", "names no picture"),
    (" \n", "names no picture"), ("\n".join(f"{n:02}.png" for n in range(20)), "nothing is left to learn"),
    (b"\xff", "is not UTF-8"), ("nothing", "held.txt:1  there is no picture 'nothing'")])
def test_files_that_cannot_be_followed(folder, tmp_path, text, said):
    with pytest.raises(FinetuneError) as error:
        listed(indexed(folder), tmp_path, text)
    assert str(error.value).startswith("data.validation.files: ") and said in str(error.value)


def test_a_missing_file_is_told(folder):
    with pytest.raises(FinetuneError, match="data.validation.files: absent.txt: No such file"):
        split(indexed(folder), None, "absent.txt", 0, HOW)


def test_a_copy_that_is_learned_is_told(folder, tmp_path):
    picture(3).save(folder / "copy.jpg", quality=80)
    with pytest.raises(FinetuneError, match="/03.png is held out, but .*/copy.jpg shows the same and is learned"):
        listed(indexed(folder), tmp_path, "03.png")
    assert listed(indexed(folder), tmp_path, "03.png\ncopy.jpg") == {"03.png", "copy.jpg"}
