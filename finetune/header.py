"""The header of a safetensors file, read by nobody's parser but this one: a header can hurt before any tensor is read.

It is scanned from front to back, and only what an adapter's file may hold is ever built: `"name":{"dtype":…,"shape":[…],
"data_offsets":[…]}` and one object of texts. So neither depth nor numbers nor names can fill the memory or take long
(scripts/faults/headers.py measures it), and a name that stands twice, which parsers resolve differently, is an error.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import FinetuneError

MAX_HEADER_BYTES = 16 * 2**20
MAX_METADATA_BYTES = 2 * 2**20      # ComfyUI shows no more than half of that
MAX_TENSORS = 20_000
MAX_NAME_BYTES = 256
MAX_AXES = 8
PICKLES = {".ckpt", ".pt", ".pth", ".bin"}
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}
FLOATS = {"F16": "<e", "F32": "<f", "F64": "<d", "BF16": ""}

_SPACE = rb"[ \t\r\n]*"
_MARKS = {mark: re.compile(_SPACE + re.escape(mark) + _SPACE) for mark in (b"{", b"}", b":", b",")}
_QUOTED = re.compile(rb'"([^"]*)"')
_INSIDE = re.compile(rb'(?:[^"\\]+|\\.){0,4096}', re.S)     # of a string; bounded, since each step is remembered
_NUMBER = rb"(?:0|-?[1-9][0-9]{0,19})" + _SPACE
_NUMBERS = _SPACE + rb"(?:" + _NUMBER + rb"(?:," + _SPACE + _NUMBER + rb"){0,15})?"
_VALUE = rb'(?:"([A-Za-z][A-Za-z0-9_]{0,15})"|\[(' + _NUMBERS + rb")\])"
_FIELD = _SPACE.join((b"", rb'"(dtype|shape|data_offsets)"', b":", _VALUE, b""))
_ENTRY = re.compile(rb"\{" + b",".join([_FIELD] * 3) + rb"\}")


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its data: nothing here needs torch."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]  # name -> (safetensors dtype, shape)
    metadata: dict[str, str]
    scalars: dict[str, float]  # the value of each 0-dim float tensor: alphas


def read_header(path: str | Path) -> Header:
    """Read and check the header of a safetensors file, without torch and without the tensors.

    FinetuneError for a pickle, a file that cannot be read and a header that does not describe its file.
    """
    path = Path(path)
    if path.suffix.lower() in PICKLES:
        raise FinetuneError(
            f"{path}: is a pickle, and opening a pickle can run any code it contains\n"
            "    get the .safetensors version, or convert it on a machine you can afford to lose: a model with diffusers'\n"
            "    scripts/convert_original_stable_diffusion_to_diffusers.py --to_safetensors"
        )
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):     # to open a pipe would wait for its writer
            raise OSError("it is no file")
        with open(path, "rb") as file:
            return _read(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise FinetuneError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise FinetuneError(
            f"{path}: is not a sound safetensors file: {error}\n"
            "    it is cut, damaged or of another type: fetch it again"
        ) from error


def _read(file, size: int) -> Header:
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    places, metadata = _scan(file.read(length))
    position, scalars = 0, {}
    for name, (dtype, shape, begin, end) in sorted(places.items(), key=lambda item: item[1][2:]):
        if begin != position or end < begin:
            raise ValueError(f"{name!r} should start at byte {position}, not at {begin}")
        if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
            raise ValueError(f"{name!r} has {end - begin} bytes, which is not {dtype} {list(shape)}")
        if not shape and dtype in FLOATS:
            scalars[name] = begin
        position = end
    if 8 + length + position != size:
        raise ValueError(f"its tensors end at byte {8 + length + position} of {size}")
    return Header({name: place[:2] for name, place in places.items()}, metadata,
                  {name: _scalar(file, 8 + length + begin, places[name][0]) for name, begin in scalars.items()})


Place = tuple[str, tuple[int, ...], int, int]       # dtype, shape, where its data begin and end


def _scan(data: bytes) -> tuple[dict[str, Place], dict[str, str]]:
    for _ in codecs.iterdecode((data[i:i + 2**16] for i in range(0, len(data), 2**16)), "utf-8"):
        pass
    scan, places, metadata = _Scan(data), {}, None
    if not scan.took(b"{"):
        raise ValueError("its header is not a JSON object")
    for name in scan.names(MAX_NAME_BYTES):
        if name in places or (name == "__metadata__" and metadata is not None):
            raise ValueError(f"{name!r} stands in it twice")
        if name == "__metadata__":
            metadata = _metadata(scan)
        elif len(places) == MAX_TENSORS:
            raise ValueError(f"more than {MAX_TENSORS} tensors")
        else:
            places[name] = _place(scan, name)
    if scan.at != len(data):
        raise ValueError(f"byte {scan.at} of its header is more than the JSON object")
    return places, metadata or {}


def _metadata(scan: _Scan) -> dict[str, str]:
    metadata, begin, wrong = {}, scan.at, ValueError("its metadata are not pairs of texts")
    if not scan.took(b"{"):
        raise wrong
    for key in scan.names(MAX_NAME_BYTES):
        if key in metadata:
            raise ValueError(f"{key!r} stands in its metadata twice")
        if scan.data[scan.at:scan.at + 1] != b'"':
            raise wrong
        metadata[key] = scan.text(MAX_METADATA_BYTES)
        if scan.at - begin > MAX_METADATA_BYTES or len(metadata) > MAX_TENSORS:
            raise ValueError(f"more than {MAX_METADATA_BYTES} bytes or {MAX_TENSORS} pairs of metadata")
    return metadata


def _place(scan: _Scan, name: str) -> Place:
    entry = _ENTRY.match(scan.data, scan.at)
    a, text_a, list_a, b, text_b, list_b, c, text_c, list_c = entry.groups() if entry else [None] * 9
    fields = {a: text_a or list_a, b: text_b or list_b, c: text_c or list_c}
    if len(fields) != 3:
        raise ValueError(f"{name!r} lacks its dtype, shape or data_offsets, or has more than these")
    dtype, shape, offsets = fields[b"dtype"].decode(), fields[b"shape"], fields[b"data_offsets"]
    if dtype not in ITEM_BYTES:
        raise ValueError(f"{name!r} is of an unknown type {dtype}")
    try:
        numbers = [*map(int, shape.split(b","))] if shape.strip() else []
        begin, end = map(int, offsets.split(b","))
        if not 0 <= min(begin, end, *numbers) <= max(begin, end, *numbers) <= 2**48 or len(numbers) > MAX_AXES:
            raise ValueError
    except ValueError:
        raise ValueError(f"shape or offsets of {name!r} are not whole numbers of a sane size") from None
    scan.at = entry.end()
    return dtype, tuple(numbers), begin, end


class _Scan:
    """A place in a JSON text that only moves forward."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def took(self, char: bytes) -> bool:
        """Go past this character and the space around it, if it is next."""
        if found := _MARKS[char].match(self.data, self.at):
            self.at = found.end()
        return found is not None

    def names(self, most: int) -> Iterator[str]:
        """The names of an object whose brace was taken; before the next is asked for, the value is to be gone past."""
        more = not self.took(b"}")
        while more:
            name = self.text(most)
            if not self.took(b":"):
                raise ValueError(f"Expecting a colon at byte {self.at} of its header")
            yield name
            more = self.took(b",")
            if not more and not self.took(b"}"):
                raise ValueError(f"Expecting a comma or a brace at byte {self.at} of its header")

    def text(self, most: int) -> str:
        """The string that is next, of at most so many bytes."""
        begin, end = self.at, self.at + 1
        quoted = _QUOTED.match(self.data, begin, begin + most + 2)
        if quoted and b"\\" not in quoted[1] and (plain := quoted[1].decode()).isprintable():     # as nearly all are
            self.at = quoted.end()
            return plain
        if self.data[begin:end] != b'"':
            raise ValueError(f"Expecting a text in quotes at byte {begin} of its header")
        while (further := _INSIDE.match(self.data, end, begin + most + 2).end()) > end:
            end = further
        if end - begin > most:
            raise ValueError(f"a text of more than {most} bytes at byte {begin} of its header")
        if self.data[end:end + 1] != b'"':
            raise ValueError(f"a text without an end at byte {begin} of its header")
        self.at = end + 1
        found = json.loads(self.data[begin:self.at].decode())
        found.encode()      # half of a surrogate pair, which JSON can spell, is no text
        return found


def _scalar(file, position: int, dtype: str) -> float:
    file.seek(position)
    data = file.read(ITEM_BYTES[dtype])
    if dtype == "BF16":  # the upper half of a float32
        return struct.unpack("<f", b"\0\0" + data)[0]
    return struct.unpack(FLOATS[dtype], data)[0]
