"""Damage to safetensors files: to bytes, to headers, and to tensors in files that are sound."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any, Final

from fuzz.values import mutated_bytes, mutated_value

SIZES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2,
    "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of an item of every dtype."""
LETTERS: Final = {"U8": "B", "I16": "h", "I32": "i", "I64": "q", "F16": "e", "F32": "f"}
"""How `struct` calls the dtypes in which quantine stores."""
INDICES: Final = (
    "labels", "order", "in_perm", "row_offsets", "col_vals", "outlier_gap", "feedback", "reach",
    "codes", "zero", "scale", "scale_step", "scale_zero", "outlier_value", "dense_weights",
)  # fmt: skip
"""Last parts of names of the tensors that are damaged most often."""
Tensor = tuple[str, list[int], bytes]
"""Dtype, shape and bytes."""


def read(data: bytes) -> dict[str, Tensor]:
    """The tensors of a sound file, by name."""
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    header.pop("__metadata__", None)
    return {
        name: (info["dtype"], info["shape"], body[slice(*info["data_offsets"])])
        for name, info in header.items()
    }


def written(tensors: dict[str, Tensor]) -> bytes:
    """A sound file of ``tensors``, unless their shapes and bytes disagree."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, (dtype, shape, data) in tensors.items():
        ends = [len(body), len(body) + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": ends}
        body += data
    return _framed(header, body)


def _framed(header: dict[str, Any], body: bytes) -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def mutated_tensors(random: Random, data: bytes) -> bytes:
    """The safetensors file ``data`` with one or two kinds of damage."""
    kind = random.randrange(10)
    if kind == 0:
        return mutated_bytes(random, data)
    if kind == 1:
        return _other_header(random, data)
    tensors = read(data)
    for _ in range(random.choice((1, 1, 1, 2))):
        damage = random.choice(DAMAGES)
        damage(random, tensors, _chosen(random, tensors))
    return written(tensors)


def _chosen(random: Random, tensors: dict[str, Tensor]) -> str:
    wanted = random.choice((*INDICES, "", ""))
    names = [name for name in tensors if name.rpartition(".")[2] == wanted]
    return random.choice(names or list(tensors))


def _other_header(random: Random, data: bytes) -> bytes:
    (size,) = struct.unpack("<Q", data[:8])
    raw, body = data[8 : 8 + size], data[8 + size :]
    kind = random.randrange(4)
    if kind == 0:
        lie = random.choice((0, 1, size - 1, size + 8, len(data), 2**32, 2**63, 2**64 - 1))
        return struct.pack("<Q", lie) + data[8:]
    if kind == 1:
        changed = bytearray(raw)
        for _ in range(random.choice((1, 3))):
            changed[random.randrange(len(changed))] = random.randrange(256)
        return data[:8] + bytes(changed) + body
    return _framed(mutated_value(random, json.loads(raw)), body)


def _items(random: Random, tensors: dict[str, Tensor], name: str) -> None:
    """Replace some items by others of the dtype: extreme ones, and for floats none that count."""
    dtype, shape, data = tensors[name]
    letter = LETTERS.get(dtype)
    if letter is None or not data:
        return
    size = SIZES[dtype]
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 4, 32))):
        bits = 8 * size
        count = len(data) // size
        if dtype.startswith("F"):
            item = random.choice(
                (0.0, -1.0, 1e-7, 60000.0, float("nan"), float("inf"), -float("inf"))
            )
        elif dtype == "U8":
            item = random.choice((0, 1, 254, 255, random.randrange(256)))
        else:
            top = 2 ** (bits - 1)
            near = (-1, 0, 1, count, count - 1, count + 1, random.randrange(count))
            item = random.choice((*near, top - 1, -top, random.randrange(-top, top)))
            item = max(-top, min(top - 1, item))
        struct.pack_into(f"<{letter}", changed, random.randrange(count) * size, item)
    tensors[name] = dtype, shape, bytes(changed)


def _fill(random: Random, tensors: dict[str, Tensor], name: str) -> None:
    dtype, shape, data = tensors[name]
    filling = random.choice((b"\x00", b"\xff", b"\x7f", b"\x01"))
    tensors[name] = dtype, shape, filling * len(data)


def _retype(random: Random, tensors: dict[str, Tensor], name: str) -> None:
    """Another dtype, of the same size of items or with as many bytes as it needs."""
    dtype, shape, data = tensors[name]
    other = random.choice(list(SIZES))
    count = len(data) // SIZES[dtype]
    resized = (data * (SIZES[other] // SIZES[dtype] + 1))[: count * SIZES[other]]
    tensors[name] = other, shape, resized


def _drop(random: Random, tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def _rename(random: Random, tensors: dict[str, Tensor], name: str) -> None:
    path, _, leaf = name.rpartition(".")
    new = random.choice((f"{path}.{random.choice(INDICES)}", f"x{name}", leaf, f"{name}.x", ""))
    tensors[new] = tensors.pop(name)


def _swap(random: Random, tensors: dict[str, Tensor], name: str) -> None:
    other = _chosen(random, tensors)
    tensors[name], tensors[other] = tensors[other], tensors[name]


def _add(random: Random, tensors: dict[str, Tensor], name: str) -> None:
    path = name.rpartition(".")[0]
    tensors[f"{path}.{random.choice(INDICES)}"] = tensors[_chosen(random, tensors)]


def _resize(random: Random, tensors: dict[str, Tensor], name: str) -> None:
    """Another shape, with the bytes it needs."""
    dtype, shape, data = tensors[name]
    new = list(shape)
    kind = random.randrange(6)
    if kind == 0 or not new:
        new = [len(data) // SIZES[dtype]]
    elif kind == 1:
        new = new[::-1]
    elif kind == 2:
        new = [1, *new]
    else:
        axis = random.randrange(len(new))
        old = new[axis]
        new[axis] = random.choice((0, 1, max(0, old - 1), old + 1, old * 2, old // 2))
    count = SIZES[dtype]
    for length in new:
        count *= length
    tensors[name] = dtype, new, (data * (count // max(1, len(data)) + 1))[:count].ljust(count, b"0")


def _lie(random: Random, tensors: dict[str, Tensor], name: str) -> None:
    """A shape that the bytes do not fill."""
    dtype, shape, data = tensors[name]
    lies: tuple[list[Any], ...] = (
        [2**40, 2**40], [2**62, 4], [-1], [1.5], ["x"], [*shape, 2], [0], [], [2**63], [None],
    )  # fmt: skip
    tensors[name] = dtype, random.choice(lies), data


DAMAGES: Final[tuple[Callable[[Random, dict[str, Tensor], str], None], ...]] = (
    _items, _items, _items, _items, _fill, _retype, _drop, _rename, _swap, _add, _resize, _resize,
    _lie,
)  # fmt: skip
"""Kinds of damage; what is listed more often is done more often."""
