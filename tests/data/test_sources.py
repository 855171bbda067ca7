import io
import json
import os
import sys
import tarfile
import unicodedata

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from finetune.data.folders import Files
from finetune.data.index import build
from finetune.data.pictures import Reading
from finetune.errors import FinetuneError
from finetune.recipe.data import Images

HOSTILE = "a\nb\x1b[2J.png"


@pytest.fixture(autouse=True)
def own_memory(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path_factory.mktemp("own")))


def index(*sources, masks=None, **words):
    return build([Images(path=str(s), **words) for s in sources], Reading(), masks, print, True)


def picture(n=0, size=(8, 6), form="PNG") -> bytes:
    Image.new("RGB", size, (n, 0, 0)).save(file := io.BytesIO(), form)
    return file.getvalue()


def folder(root, **files):
    """Files by name, `/` for folders; a number makes a picture."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        content = picture(content, (8 + content, 6)) if isinstance(content, int) else content
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def rows(*rows) -> str:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"


def columns(found) -> dict[str, dict]:
    return {found.name(i).rpartition("/")[2]: found.columns(i) for i in range(len(found))}


def notes(found, fatal=None) -> list[str]:
    return [f"{n.kind} {n.name}: {n.text}" for n in found.notes if fatal in (None, n.fatal)]


def refused(*sources, **words) -> str:
    with pytest.raises(FinetuneError) as error:
        index(*sources, **words)
    return str(error.value)


# folders

def test_a_folder_is_told_from_its_depths_in_the_order_of_names(tmp_path):
    found = index(folder(tmp_path, **{"b/x.png": 1, "b-1.png": 2, "a.PNG": 0, ".hidden/a.png": 3, "._a.png": 4}))
    assert [found.name(i) for i in range(3)] == [f"{tmp_path}/a.PNG", f"{tmp_path}/b-1.png", f"{tmp_path}/b/x.png"]
    assert found.width.tolist() == [8, 10, 9] and not found.notes and len(found) == 3


def test_values_of_a_table_become_text(tmp_path):
    row = {"file_name": "./a.png", "text": "ä b", "n": 3, "yes": True, "none": None, "empty": " ", "tags": ["x", "ü"]}
    folder(tmp_path, **{"a.png": 0, "metadata.jsonl": rows("", row)})
    assert columns(index(tmp_path)) == {"a.png": {"text": "ä b", "n": "3", "yes": "true", "tags": '["x", "ü"]'}}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_of_other_kinds(kind, tmp_path):
    folder(tmp_path, **{"s/a.png": 0, "s/b.png": 1})
    if kind == "csv":
        folder(tmp_path, **{"s/metadata.csv": '\ufefffile_name,text,n\na.png,"one\ntwo, ""x""",007\nb.png,,\n'})
    else:
        table = {"file_name": ["a.png", "b.png"], "text": ['one\ntwo, "x"', None], "n": ["007", None]}
        pa.parquet.write_table(pa.table(table), tmp_path / "s/metadata.parquet")
    assert columns(index(tmp_path)) == {"a.png": {"text": 'one\ntwo, "x"', "n": "007"}, "b.png": {}}


def test_what_is_wrong_with_a_table_is_told_with_its_line(tmp_path):
    folder(tmp_path, **{"a.png": 0, "c.gif": "x", "metadata.jsonl": rows(
        {"file_name": "a.png", "text": "a"}, "{no json", {"text": "x"}, [1], {"file_name": "gone.png"},
        {"file_name": "c.gif"}, {"file_name": "a.png", "text": "b"}, '{"file_name": "a.png", "text": "\\ud800"}')})
    found, table = index(tmp_path), f"table {tmp_path}/metadata.jsonl"
    said = "\n".join(notes(found, fatal=True))
    for part in (f"{table}:2: not an object", f"{table}:3: not an object", f"{table}:4: not an object",
                 f"{table}:5: there is no gone.png", f"{table}:6: c.gif is none of the pictures",
                 f"{table}:7: a second row for a.png", f"{table}:8: holds half of a surrogate pair"):
        assert part in said, part
    assert columns(found) == {"a.png": {"text": "a"}}


def parquet(**columns) -> bytes:
    pa.parquet.write_table(pa.table({"file_name": ["a.png"], **columns}), sink := pa.BufferOutputStream())
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("name, content, part", [
    ("metadata.jsonl", b'{"file_name": "a.png"}\n{"text": "\xe4"}', "metadata.jsonl:2: is not UTF-8 (byte 10)"),
    ("metadata.jsonl", b'{"file_name": "a.png"}\n' + b"[" * 10**5, "metadata.jsonl:2: not an object"),
    ("metadata.csv", b"file_name,text\na.png,\xe4", "metadata.csv:2: is not UTF-8"),
    ("metadata.csv", b"name,text\n", "metadata.csv:1: has no column file_name"),
    ("metadata.csv", b"file_name,text\na.png,b,c\n", "metadata.csv:2: has 3 fields"),
    ("metadata.csv", b'file_name,text\na.png,"b\n', "metadata.csv:2: is no CSV"),
    ("metadata.parquet", b"PAR1", "metadata.parquet: cannot be read as parquet"),
    ("metadata.parquet", parquet(day=pa.array([2**31 - 1], pa.date32())), "metadata.parquet: cannot be read as parquet: day"),
    ("a.txt", b"\xe4", "a.txt: is not UTF-8 (byte 0)"),
    ("a.caption", b"ok\xe4", "a.caption: is not UTF-8 (byte 2)")])
def test_broken_files_are_told(name, content, part, tmp_path):
    assert any(part in note for note in notes(index(folder(tmp_path, **{"a.png": 0, name: content})), fatal=True))


def test_sidecars(tmp_path):
    folder(tmp_path, **{"a.png": 0, "a.txt": "\ufeffein schöner\n  Hund \n", "b.png": 1, "b.caption": "b", "c.png": 2,
                        "a.caption": "not I", "lonely.txt": "x", "d.heic": "x",
                        "metadata.jsonl": rows({"file_name": "a.png", "n": 1}, {"file_name": "b.png", "text": "B"})})
    found = index(tmp_path)
    assert columns(found) == {"a.png": {"text": "ein schöner Hund", "n": "1"}, "b.png": {"text": "B"}, "c.png": {}}
    said = notes(found, fatal=False)
    assert len(said) == 3 and len(found.notes) == 3 and f"sidecar {tmp_path}/a.caption: is not used: a.txt is" in said
    assert any("lonely.txt: there is no picture" in s for s in said)
    assert any(s.startswith("suffix") and "d.heic" in s for s in said)


@pytest.mark.parametrize("table, disk", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_fit_in_either_form_of_their_letters(table, disk, tmp_path):
    name, other = (unicodedata.normalize(form, "schön.png") for form in (disk, table))
    folder(tmp_path, **{name: 0, "metadata.jsonl": rows({"file_name": other, "n": 1}), other.replace("png", "txt"): "x"})
    found = index(tmp_path)
    assert not found.notes and found.columns(0) == {"n": "1", "text": "x"}


def test_folders_behind_links_are_walked_once(tmp_path):
    folder(tmp_path / "all", **{"z/a.png": 0})
    folder(tmp_path / "other", **{"b.png": 1})
    for link, to in (("z/loop", ".."), ("self", "."), ("again", "z"), ("elsewhere", "../other"), ("nowhere", "gone"),
                     ("knot", "knot"), ("broken.png", "gone.png")):
        (tmp_path / "all" / link).symlink_to(to)
    found = index(tmp_path / "all")
    names = [found.name(i).removeprefix(f"{tmp_path}/all/") for i in range(len(found))]
    assert names == ["elsewhere/b.png", "z/a.png"]
    assert [n.kind for n in found.notes] == ["unreadable"] and "broken.png" in found.notes[0].name


def test_what_is_removed_while_it_is_listed_is_not_there(tmp_path, monkeypatch):
    folder(tmp_path, **{"0.png": 0, "1.png": 1, "2.png": 2})

    def removing(files, entries):
        (tmp_path / "1.png").unlink()
        return add(files, entries)

    add = Files.add
    monkeypatch.setattr(Files, "add", removing)
    found = index(tmp_path)
    assert list(columns(found)) == ["0.png", "2.png"] and not found.notes


def test_a_name_is_always_printable(tmp_path):
    found = index(folder(tmp_path, **{HOSTILE: 0, os.fsdecode(b"\xff.png"): 1, os.fsdecode(b"\xfe.png"): "x"}))
    assert found.name(0) == f"{tmp_path}/a\\nb\\x1b[2J.png" and found.name(1).endswith("\\udcff.png")
    assert all(n.name.isprintable() for n in found.notes) and len(found.notes) == 1 and found.read(1) == picture(1, (9, 6))


def test_files_that_are_far_too_long_are_not_read(tmp_path):
    """Each has 50 GiB, of holes, and would fill the memory."""
    (tmp_path / "x").mkdir()
    folder(tmp_path / "x", **{"0.png": 0, "1.png": 1, "1.txt": "", "2.png": b"", "metadata.jsonl": ""})
    for name in ("1.txt", "2.png", "metadata.jsonl"):
        os.truncate(tmp_path / "x" / name, 50 * 2**30)
    assert {n.name.rpartition("/")[2]: n.text for n in index(tmp_path / "x").notes if n.fatal} == {
        "metadata.jsonl:1": "is a line of more than 2,097,152 bytes",
        "1.txt": "cannot be read: 53,687,091,200 bytes are more than the 2,097,152 that are read",
        "2.png": "not a readable picture (53,687,091,200 bytes are more than the 545,259,520 that are read); "
                 "repair or remove it"}
    header = tarfile.TarInfo("0.txt")
    header.size = 50 * 2**30
    (tmp_path / "a.tar").write_bytes(tar(tmp_path / "b.tar", ("0.png", picture())).read_bytes()[:1024] + header.tobuf())
    os.truncate(tmp_path / "a.tar", header.size + 4096)
    assert notes(index(tmp_path / "a.tar"), fatal=True) == [
        f"text {tmp_path}/a.tar/0.txt: has more than 2,097,152 bytes; is it a caption?"]


def test_a_folder_named_like_a_picture_and_a_pipe(tmp_path):
    folder(tmp_path, **{"a.png/b.png": 0})
    os.mkfifo(tmp_path / "c.png")
    assert columns(index(tmp_path)).keys() == {"b.png"}


# paths that are nothing

def test_what_is_not_there(tmp_path, monkeypatch):
    folder(tmp_path, **{"dogs/a.txt": "x", "file": "x", "x.tar": b""})
    monkeypatch.chdir(tmp_path)
    assert refused("dog") == "data.images: there is no folder dog; did you mean 'dogs'?"
    assert "there is no folder" in refused("dogs/small") and "holds no pictures" in refused("dogs")
    assert "is a file" in refused("file") and "no file fits y.tar; did you mean 'x.tar'?" in refused("y.tar")
    assert "compressed" in refused("x.tar.gz") and "compressed" in refused("x.tgz")
    said = refused("dog", "file")
    assert "data.images.0: there is no" in said and "\ndata.images.1: file is a file" in said


@pytest.mark.parametrize("words", [{"split": "test"}, {"image": "picture"}, {"limit": 3}, {"streaming": True, "limit": 3}])
def test_words_of_a_dataset_are_refused_elsewhere(words, tmp_path):
    said = refused(folder(tmp_path, **{"a.png": 0}), **words)
    assert next(iter(words)) in said and "goes with a dataset" in said


# tars

def tar(path, *members):
    with tarfile.open(path, "w") as file:
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def member(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_shards(tmp_path):
    tar(tmp_path / "b.tar", ("x/2.png", picture(2)), ("x/2.seg.png", picture(9)))
    tar(tmp_path / "a.tar", ("1.txt", b" a\ncaption "), ("1.jpg", picture(1, form="JPEG")), ("1.cls", b"3"),
        ("1.pickle", b"evil"), ("1.json", b'{"n": 1, "tags": ["x"]}'), ("._1.jpg", b"x"), ("lonely.txt", b"x"))
    found = index(tmp_path / "*.tar")
    assert columns(found) == {"1.jpg": {"text": "a caption", "n": "1", "tags": '["x"]'}, "2.png": {}}
    assert [found.name(i) for i in range(2)] == [f"{tmp_path}/a.tar/1.jpg", f"{tmp_path}/b.tar/x/2.png"]
    assert found.read(0) == picture(1, form="JPEG") and found.read(1) == picture(2)
    assert notes(found) == [f"sidecar {tmp_path}/a.tar/lonely: there is no picture of this name beside it"]
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(FinetuneError, match="a.tar/1.jpg: cannot be read any more"):
        found.read(0)


def test_what_is_remembered_of_a_shard_has_the_names_of_its_pattern(tmp_path):
    for folder in "xy":
        (tmp_path / folder).mkdir()
        tar(tmp_path / folder / "a.tar", ("1.png", picture(1)))
    for pattern, own in (("x/*.tar", "x"), ("*/*.tar", "xy"), ("x/*.tar", "x")):
        found = index(tmp_path / pattern)
        assert [found.name(i) for i in range(len(found))] == [f"{tmp_path}/{folder}/a.tar/1.png" for folder in own]


@pytest.mark.parametrize("hostile", [
    "/etc/a.png", "../a.png", "x/../../a.png", member("a.png", tarfile.SYMTYPE, "/etc/passwd"),
    member("a.png", tarfile.LNKTYPE, "good.png"), member("a.png", tarfile.CHRTYPE), member("a.png", tarfile.FIFOTYPE)])
def test_members_that_are_not_safe_are_named(hostile, tmp_path):
    found = index(tar(tmp_path / "a.tar", ("good.png", picture()), (hostile, b"")))
    assert [n.kind for n in found.notes] == ["member"] and found.notes[0].fatal and "a.png" in found.notes[0].name
    assert columns(found).keys() == {"good.png"}


@pytest.mark.parametrize("break_it, part", [
    (lambda data: data[:1200], "cannot be read to its end"),
    (lambda data: data[:1024] + b"x" * 512 + data[1536:], "no member begins"),
    (lambda data: b"\x1f\x8b" + data, "compressed with gzip"), (lambda data: b"", "cannot be read")])
def test_a_broken_shard_is_told(break_it, part, tmp_path):
    path = tar(tmp_path / "a.tar", ("1.png", picture(1)), ("2.png", picture(2)), ("3.png", picture(3)))
    path.write_bytes(break_it(path.read_bytes()))
    found = index(path)
    assert [n.kind for n in found.notes if n.fatal] == ["member"] and part in found.notes[0].text


def test_two_pictures_of_one_name_and_words_that_are_none(tmp_path):
    found = index(tar(tmp_path / "a.tar", ("a.png", picture(1)), ("a.jpg", picture(2)), ("b.png", picture(3)),
                      ("b.json", b"[1]"), ("b.txt", b"\xff")))
    said = "\n".join(notes(found, fatal=True))
    assert "a second picture of the example a" in said and "b.json: no JSON object" in said and "b.txt: is not UTF-8" in said


# datasets

@pytest.fixture
def table():
    number = datasets.Value("int32")
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string"), "n": number,
                                  "kind": datasets.ClassLabel(names=["cat", "dog"]), "box": datasets.List(number)})
    return datasets.Dataset.from_dict({
        "image": [{"bytes": picture(n), "path": None} for n in range(4)], "caption": ["a", "b", None, "d"],
        "n": [1, 2, 3, 4], "kind": [0, 1, 0, 1], "box": [[1]] * 4}, features=features)


def test_a_saved_dataset(table, tmp_path):
    table.save_to_disk(tmp_path / "saved")
    found = index(tmp_path / "saved", limit=3)
    assert [found.columns(i) for i in range(3)] == [
        {"caption": "a", "n": "1", "kind": "cat"}, {"caption": "b", "n": "2", "kind": "dog"}, {"n": "3", "kind": "cat"}]
    assert len(found) == 3 and found.read(2) == picture(2) and found.name(2) == f"{tmp_path}/saved[2]"
    for words, part in (({"image": "pic"}, "has no column pic"), ({"image": "n"}, "no pictures"),
                        ({"split": "x"}, "no split x"), ({"streaming": True, "limit": 1}, "hub id")):
        assert part in refused(tmp_path / "saved", **words)


def test_splits_of_a_saved_dataset(table, tmp_path):
    datasets.DatasetDict(train=table, test=table.select([3])).save_to_disk(tmp_path / "saved")
    found = index(tmp_path / "saved", split="test")
    assert len(found) == 1 and found.name(0) == f"{tmp_path}/saved[test][0]"
    assert "no split tests; did you mean 'test'?" in refused(tmp_path / "saved", split="tests")


def test_a_row_without_picture_is_told(table, tmp_path):
    pictures = pa.array([{"bytes": None, "path": None}, None, {"bytes": picture(), "path": None}, None],
                        pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table.add_column("other", pictures).save_to_disk(tmp_path / "saved")
    found = index(tmp_path / "saved", image="other")
    assert len(found) == 1 and len(found.notes) == 3 and "no picture in this row" in found.notes[0].text


def test_a_row_may_name_a_file_of_its_dataset_and_no_other(tmp_path, monkeypatch):
    """Not even by a link, and nothing that waits for a writer. Told of a stream too, whose files become bytes."""
    own, theirs = tmp_path / "saved" / "own.png", tmp_path / "theirs.png"
    names = [own, theirs, tmp_path / "saved" / "link.png", tmp_path / "saved" / "pipe.png", "/proc/self/environ"]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"bytes": None, "path": str(name)} for name in names], kind)
    table = datasets.Dataset(pa.table({"image": rows}))     # as a table of its own making: `datasets` puts files in
    table.save_to_disk(tmp_path / "saved")
    stream = table.cast_column("image", datasets.Image(decode=False)).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split, streaming: stream)
    assert "which is no file of the hub" in refused("some/pictures", streaming=True, limit=1)
    own.write_bytes(picture())
    theirs.write_bytes(picture())
    names[2].symlink_to(theirs)
    os.mkfifo(names[3])
    found = index(tmp_path / "saved")
    assert [found.name(i) for i in range(len(found))] == [f"{tmp_path}/saved[0]"]
    assert [str(name) in note.text and "no file of the dataset" in note.text for name, note in zip(names[1:], found.notes)
            ] == [True] * 4


def test_a_hub_id_that_cannot_be_loaded(monkeypatch):
    def load(path, split, streaming):
        raise ConnectionError("offline\nmore")
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert refused("nobody/nothing") == ("data.images: there is no folder nobody/nothing, and as a dataset of the hub it "
                                         "cannot be loaded: offline")


def test_a_stream_is_read_once(table, monkeypatch):
    calls = []

    def load(path, split, streaming):
        calls.append(streaming)
        return table.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert "streaming needs a limit" in refused("some/pictures", streaming=True)
    for _ in range(2):
        found = index("some/pictures", streaming=True, limit=3)
        assert len(found) == 3 and found.read(2) == picture(2) and found.columns(1)["kind"] == "dog"
    assert calls == [True] and found.name(1) == "some/pictures[train][1]"


def test_a_stream_that_was_cut_off_is_read_again(table, monkeypatch):
    def rows(cut):
        yield from (table[0], table[1])
        if cut:
            raise ConnectionError("reset")

    def load(path, split, streaming):
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"cut": cut}, features=table.features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    cut = True
    assert "was cut off (reset)" in refused("some/pictures", streaming=True, limit=3)
    cut = False
    assert len(index("some/pictures", streaming=True, limit=3)) == 2


def test_a_place_can_be_read_without_torch():
    code = "import finetune.data.examine, finetune.data.sources, sys; assert not {'torch', 'datasets'} & set(sys.modules)"
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", code) == 0
