import json
import os
import signal

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from finetune.data import examine, memory
from finetune.data.index import build, concatenated
from finetune.data.pictures import Reading
from finetune.errors import FinetuneError
from finetune.recipe.data import Images


@pytest.fixture(autouse=True)
def store(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("own")
    monkeypatch.setenv("FINETUNE_CACHE", str(folder))
    return folder / "index"


@pytest.fixture
def decoded(monkeypatch):
    """The number of pictures that were decoded since it was asked last."""
    count, read = [0], examine.read

    def counting(*arguments):
        count[0] += 1
        return read(*arguments)

    def since() -> int:
        said, count[0] = count[0], 0
        return said

    monkeypatch.setattr(examine, "read", counting)
    return since


def fill(root, count=4, start=0):
    root.mkdir(parents=True, exist_ok=True)
    for n in range(start, start + count):
        Image.new("RGB", (8 + n % 100, 6), (n % 256, 0, 0)).save(root / f"{n:03}.png")
    return root


def index(*sources, masks=None, how=Reading(), say=print):
    return build([s if isinstance(s, Images) else Images(path=str(s)) for s in sources], how, masks, say, True)


def same(a, b) -> bool:
    return a.table.equals(b.table) and a.notes == b.notes


def test_the_next_start_decodes_nothing(tmp_path, decoded):
    fill(tmp_path)
    (tmp_path / "bad.png").write_text("no picture")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "000.png", "text": "a"}) + "\nbad")
    first = index(tmp_path)
    assert decoded() == 5 and len(first) == 4 and [n.kind for n in first.notes] == ["table", "unreadable"]
    assert first.digest.shape == (4, 32) and first.phash.dtype == np.uint64 and first.width.dtype == np.int32
    assert same(first, index(tmp_path)) and decoded() == 0
    index(tmp_path, how=Reading(first_frame=True))
    assert decoded() == 5


def test_only_what_was_edited_or_added_is_decoded(tmp_path, decoded):
    fill(tmp_path)
    first = index(tmp_path).fingerprint(), decoded()
    Image.new("RGB", (9, 9)).save(tmp_path / "002.png")
    found = index(tmp_path)
    assert decoded() == 1 and found.height[2] == 9 and found.fingerprint() != first[0]
    fill(tmp_path, 1, 7)
    assert len(index(tmp_path)) == 5 and decoded() == 1
    (tmp_path / "000.png").unlink()
    assert index(tmp_path).name(0).endswith("001.png") and decoded() == 0
    status = (tmp_path / "001.png").stat()
    os.utime(tmp_path / "001.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    index(tmp_path)
    assert decoded() == 1
    old, size = (tmp_path / "001.png").stat(), (tmp_path / "001.png").stat().st_size
    (tmp_path / "001.png").write_bytes(bytes(size))         # the same size, and the time put back
    os.utime(tmp_path / "001.png", ns=(old.st_atime_ns, old.st_mtime_ns))
    assert "not a readable picture" in index(tmp_path).notes[0].text and decoded() == 1


@pytest.mark.parametrize("name", ["000.txt", "metadata.jsonl", "metadata.csv"])
def test_an_edited_caption_is_noticed(name, tmp_path, decoded):
    content = {"000.txt": "{}", "metadata.csv": "file_name,text\n000.png,{}\n",
               "metadata.jsonl": '{{"file_name": "000.png", "text": "{}"}}\n'}[name]
    fill(tmp_path, 1)
    for time, words in enumerate(["one", "two", "three", ""]):
        (tmp_path / name).write_text(content.format(words))
        os.utime(tmp_path / name, ns=(time, time))
        assert index(tmp_path).columns(0).get("text", "") == words
    assert decoded() == 1


def test_damage_is_found_and_repaired(tmp_path, store, decoded):
    first = index(fill(tmp_path))
    for harm in (lambda d: d[:len(d) // 2], lambda d: b"", lambda d: d[:-1], lambda d: b"x" * 10,
                 lambda d: d[:200] + bytes([d[200] ^ 1]) + d[201:]):
        for file in store.iterdir():
            file.write_bytes(harm(file.read_bytes()))
        decoded()
        assert same(first, index(tmp_path)) and decoded() == 4
        assert same(first, index(tmp_path)) and decoded() == 0


def test_without_a_place_to_write_it_works(tmp_path, store, decoded):
    store.write_text("no folder")
    said = []
    assert len(index(fill(tmp_path), say=said.append)) == 4 and len(index(tmp_path, say=said.append)) == 4
    assert decoded() == 8 and len(said) == 2 and "cannot be written" in said[0]


def test_what_was_decoded_before_an_interruption_is_kept(tmp_path, monkeypatch, decoded):
    fill(tmp_path, 10)
    monkeypatch.setattr(examine, "PORTION", 3)
    counting = examine.read

    def interrupted(data, *rest):
        image = counting(data, *rest)
        if image.width == 8 + 7:
            raise KeyboardInterrupt
        return image

    monkeypatch.setattr(examine, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index(tmp_path)
    monkeypatch.setattr(examine, "read", counting)
    assert decoded() == 8 and len(index(tmp_path)) == 10 and decoded() == 4


def raising(error):
    def call(*_):
        raise error
    return call


def test_what_may_change_by_itself_is_not_remembered(tmp_path, monkeypatch):
    fill(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr("finetune.data.folders.Folder.read", raising(PermissionError(13, "Permission denied")))
        assert [n.kind for n in index(tmp_path).notes] == ["unreadable"] * 2
    with monkeypatch.context() as patch:
        patch.setattr(examine, "shrunk", raising(MemoryError()))
        assert "memory" in index(tmp_path).notes[0].text
    assert len(index(tmp_path)) == 2


def test_many_are_decoded_by_processes_to_the_same_end(tmp_path, monkeypatch):
    fill(tmp_path, 30)
    (tmp_path / "bad.png").write_text("no picture")
    here = index(tmp_path, how=Reading())
    monkeypatch.setattr(examine, "FEW", 0)
    monkeypatch.setattr(examine, "PORTION", 4)
    assert same(here, index(tmp_path, how=Reading(first_frame=True)))


class Deadly:
    """A place with a picture that no decoder survives."""

    prefix, identity = "", "deadly"

    def read(self, name, part, offset, size):
        if offset == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(0, "not this time")

    def soon(self, rows):
        pass

    def portable(self, rows):
        return self


def test_a_picture_that_kills_its_process_is_named(monkeypatch):
    monkeypatch.setattr(examine, "FEW", 0)
    monkeypatch.setattr(examine, "PORTION", 3)
    numbers = np.arange(12)
    listed = pa.table([[b"x"] * 12, numbers.astype(np.int32), numbers, numbers, numbers], schema=memory.LISTED)
    found = {}
    for rows, batch, lasting in examine.examined(Deadly(), listed, Reading(), numbers, True):
        found |= dict(zip(rows.tolist(), zip(batch["reason"].to_pylist(), lasting)))
    assert found == {n: (examine.KILLED if n == 5 else "not this time", False) for n in range(12)}


def test_take_and_repeats_and_several_sources(tmp_path):
    a, b = fill(tmp_path / "a", 3), fill(tmp_path / "b", 2, 5)
    found = index(Images(path=str(a), repeats=10), b)
    assert found.source.tolist() == [0, 0, 0, 1, 1] and found.repeats.tolist() == [10, 10, 10, 1, 1]
    some = found.take(np.array([4, 0]))
    assert [some.name(i) for i in range(2)] == [str(b / "006.png"), str(a / "000.png")]
    assert some.read(0) == (b / "006.png").read_bytes() and some.digest.tolist() == found.digest[[4, 0]].tolist()
    one, other = index(b).take(np.array([1])), index(Images(path=str(a), repeats=10)).take(np.array([0]))
    assert some.fingerprint() == concatenated([one, other]).fingerprint()
    assert len(found.take(np.arange(0))) == 0 and found.take(np.arange(0)).fingerprint()
    both = concatenated([some, found])
    assert both.source.tolist() == [1, 0, 2, 2, 2, 3, 3] and both.read(6) == found.read(4)


def test_the_fingerprint_tells_pictures_words_and_repeats_not_places(tmp_path):
    one = fill(tmp_path / "one")
    (one / "000.txt").write_text("a")
    first = index(one).fingerprint()
    os.rename(one, tmp_path / "two")
    two = tmp_path / "two"
    assert index(two).fingerprint() == first != index(Images(path=str(two), repeats=2)).fingerprint()
    (two / "001.txt").write_text("a")
    words = index(two).fingerprint()
    (two / "001.txt").rename(two / "002.txt")
    assert len({first, words, index(two).fingerprint(), index(two, masks=str(two)).fingerprint()}) == 4


def test_a_picture_that_is_gone_is_named(tmp_path):
    found = index(fill(tmp_path, 1))
    (tmp_path / "000.png").unlink()
    with pytest.raises(FinetuneError, match="000.png: cannot be read any more"):
        found.read(0)


def test_masks(tmp_path):
    fill(tmp_path / "pictures/sub", 3)
    masks = tmp_path / "masks"
    for name, size in (("sub/000.bmp", (8, 6)), ("sub/001.png", (8, 6)), ("sub/009.png", (8, 6))):
        (masks / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size).save(masks / name)
    (masks / "sub/bad.png").write_text("x")
    found = index(tmp_path / "pictures", masks=str(masks))
    said = [(n.kind, n.name.removeprefix(str(tmp_path)), n.text, n.fatal) for n in found.notes]
    assert [s[1:2] + s[3:] for s in said] == [("/masks/sub/bad.png", True), ("/pictures/sub/002.png", True),
                                              ("/pictures/sub/001.png", True), ("/masks/sub/009.png", False)]
    assert {s[0] for s in said} == {"mask"} and "9 × 6 pixels and its mask 8 × 6" in said[2][2]
    assert found.read_beside(0, "mask") == (masks / "sub/000.bmp").read_bytes() and found.read_beside(2, "mask") is None
    assert found.mask_digest[0].any() and not found.mask_digest[2].any()
    assert index(tmp_path / "pictures", masks="alpha").read_beside(0, "mask") is None


def test_masks_that_cannot_be(tmp_path):
    fill(tmp_path, 2)
    with pytest.raises(FinetuneError, match="data.mask.source: there is no folder"):
        index(tmp_path, masks=str(tmp_path / "gone"))
    (tmp_path / "empty").mkdir()
    assert len([n for n in index(tmp_path, masks=str(tmp_path / "empty")).notes if n.fatal]) == 2


def test_upright_sizes(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 20)).save(tmp_path / "a.jpg", exif=exif)
    found = index(tmp_path)
    assert (found.width[0], found.height[0]) == (20, 8)
