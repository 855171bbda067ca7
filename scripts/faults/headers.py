"""Mutated safetensors headers: each is read or refused in one line, fast and small. Prints how many of how many.

    python scripts/faults/headers.py [--count 100000] [--seed 0] [--seconds 0.2] [--mebibytes 50]

Memory is what Python allocates beyond the start (tracemalloc), looked at for the bombs and every hundredth mutation, since
watching costs time; time is this process's own, for the machine may have others. A header that is read must give what the
safetensors library reads from the same file, and what the file is must be said in ten times the time.
"""

import argparse
import json
import random
import struct
import sys
import tempfile
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from finetune.errors import FinetuneError  # noqa: E402
from finetune.formats._identify import identify  # noqa: E402
from finetune.header import MAX_HEADER_BYTES, MAX_METADATA_BYTES, MAX_TENSORS, Header, read_header  # noqa: E402

WORDS = [b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"null", b"NaN", b"-1", b"1e309", b"18446744073709551616", b"0",
         b"\0",
         b"\xff", "😀".encode(), b"\\ud83d", b'"F32"', b'"F4"', b'"dtype":', b'"shape":[', b'"__metadata__":{', b" " * 1000]


def entry(begin: int, end: int, shape: list | None = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def lora(modules: int = 12, rank: int = 4) -> tuple[bytes, int]:
    """The header of a small kohya file, and how many bytes of data go with it."""
    header, at = {"__metadata__": {"ss_network_dim": "4", "ss_tag_frequency": '{"a":{"b\\"c":1}}', "format": "pt"}}, 0
    for i in range(modules):
        stem = f"lora_unet_down_blocks_{i}_attentions_0_transformer_blocks_0_attn2_to_k"
        for role, shape in (("lora_down.weight", [rank, 8]), ("lora_up.weight", [16, rank]), ("alpha", [])):
            size = 4 * (shape[0] * shape[1] if shape else 1)
            header[f"{stem}.{role}"] = entry(at, at + size, shape)
            at += size
    return json.dumps(header, separators=(",", ":")).encode(), at


def bombs() -> dict[str, bytes]:
    """Headers as large as they may be, of what costs a parser most."""
    room, one = MAX_HEADER_BYTES - 100, json.dumps(entry(0, 0)).encode()
    names = b",".join(b'"%s%d":%s' % ("😀".encode() * 60, i, one) for i in range(MAX_TENSORS))
    return {
        "depth": b"[" * room, "objects": b'{"a":' * (room // 5), "lists": b"[" + b"[]," * (room // 3) + b"[]]",
        "numbers": b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[' + b"1," * (room // 2 - 50) + b"1]}}",
        "digits": b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[' + b"9" * (room - 60) + b"]}}",
        "spaces": b"{" + b" " * room + b"}", "quotes": b"{" + b'"' * room, "escapes": b'{"' + b"\\\\" * (room // 2) + b'":1}',
        "metadata": b'{"__metadata__":{"a":"' + b"x" * (room - 60) + b'"}}',
        "wide metadata": b'{"__metadata__":{"a":"' + "😀".encode() * ((MAX_METADATA_BYTES - 60) // 4) + b'"}}',
        "escaped metadata": b'{"__metadata__":{"a":"' + b"\\n" * ((MAX_METADATA_BYTES - 60) // 2) + b'"}}',
        "many metadata": b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(MAX_METADATA_BYTES // 12)) + b"}}",
        "tensors": b"{" + b",".join(b'"%d":%s' % (i, one) for i in range(MAX_TENSORS)) + b"}",
        "too many tensors": b"{" + b",".join(b'"%d":%s' % (i, one) for i in range(200_000)) + b"}",
        "wide names": b"{" + names + b"}", "one name": b"{" + b",".join([b'"a":' + one] * MAX_TENSORS) + b"}",
    }


def mutated(header: bytes, data: int, draw: random.Random) -> bytes:
    """A file with some bytes flipped, cut, doubled or replaced; now and then also with a lying length."""
    text = bytearray(header)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        at = draw.randrange(len(text) + 1)
        match draw.randrange(6):
            case 0:
                text[at:at + 1] = bytes([draw.randrange(256)])
            case 1:
                text[at:at + draw.randrange(1, 60)] = b""
            case 2:
                text[at:at] = draw.choice(WORDS) * draw.choice((1, 1, 1, 100))
            case 3:
                text[at:at + 1] = draw.choice(WORDS)
            case 4:
                other = draw.randrange(len(text) + 1)
                text[at:at] = text[other:other + draw.randrange(1, 200)]
            case 5:
                two = draw.sample([b"64", b"128", b"256", b"4", b"16", b"F32", b"F64", b"BF16"], 2)
                text = bytearray(text.replace(*two, 1))
    length = len(text) if draw.random() < 0.95 else draw.choice((0, 1, len(text) - 1, len(text) + 9, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + bytes(text) + bytes(max(0, data + draw.choice((0, 0, 0, 0, -1, 1, -data))))


def read(path: Path) -> Header | None:
    """The header, or None where it is refused as it should be; all else that is raised is a failure."""
    try:
        return read_header(path)
    except FinetuneError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 2 and len(str(error)) < 1500, str(error)[:2000]


def agrees(path: Path, header: Header) -> bool:
    """Whether the library reads the same names and metadata, if it reads the file at all."""
    try:
        with safe_open(path, "numpy") as file:
            return set(file.keys()) == header.tensors.keys() and (file.metadata() or {}) == header.metadata
    except SafetensorError:
        return True


def check(count: int, seed: int, seconds: float, mebibytes: float) -> list[str]:
    """The failures of all bombs and so many mutations."""
    draw, whole, failures = random.Random(seed), lora(), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        large = bombs()
        for i, name in enumerate([*large, *range(count)]):
            content = struct.pack("<Q", len(large[name])) + large.pop(name) if name in large else mutated(*whole, draw)
            path.write_bytes(content)
            del content
            try:
                begin = time.process_time()
                header = read(path)
                if (took := time.process_time() - begin) > seconds:
                    failures.append(f"{name}: {took:.2f} s")
                begin = time.process_time()
                with suppress(FinetuneError):       # its metadata may make no sense
                    header and identify(header)
                if (took := time.process_time() - begin) > 10 * seconds:
                    failures.append(f"{name}: {took:.2f} s to say what it is")
                assert header is None or agrees(path, header), "the library reads something else"
                if i < 50 or i % 100 == 0:
                    tracemalloc.start()
                    read(path)
                    peak = tracemalloc.get_traced_memory()[1] / 2**20
                    tracemalloc.stop()
                    if peak > mebibytes:
                        failures.append(f"{name}: {peak:.0f} MiB")
            except Exception as error:      # whatever else comes out is the failure that is looked for
                failures.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.2, help="for one header")
    parser.add_argument("--mebibytes", type=float, default=50, help="for one header")
    args = parser.parse_args()
    failures = check(args.count, args.seed, args.seconds, args.mebibytes)
    for failure in failures[:20]:
        print(failure)
    whole = args.count + len(bombs())
    print(f"headers   {whole - len({failure.split(':')[0] for failure in failures})}/{whole} read or refused in one line")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
