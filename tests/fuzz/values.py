"""Damage to values of JSON and YAML, and to bytes of any file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Final

HUGE: Final = 10**400
NUMBERS: Final = (-1, 0, 1, 2, 3, 7, 255, 2**15, 2**31, 2**63, -(2**63), HUGE)
FLOATS: Final = (0.0, -0.0, 0.5, -1.5, 1e30, 1e-45, float("nan"), float("inf"), -float("inf"))
WORDS: Final = ("", "x", "auto", "none", "../x", "/etc/passwd", "\ud800", "\x00", "é" * 500, "1")
OTHERS: Final = (None, True, False, [], {}, [0], [[]], {"x": 1})
DEEP: Final = 50_000
Path = tuple[str | int, ...]


def mutated_value(random: Random, value: Any, below: Path = ()) -> Any:
    """A copy of ``value`` with a change at one to three places.

    Args:
        below: path of the part in which changes are made, if ``value`` has it.
    """
    changed = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        part, rest = changed, below
        while rest and isinstance(part, dict | list):
            try:
                part, rest = part[rest[0]], rest[1:]
            except (LookupError, TypeError):
                break
        places = list(_places(part))
        if places:
            owner, key = random.choice(places)
            _change(random, owner, key)
    return changed


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container within ``value``, with each of its keys."""
    keys: Any = ()
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = range(min(len(value), 40))
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _change(random: Random, owner: Any, key: Any) -> None:
    old = owner[key]
    kind = random.randrange(10)
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, dict):
        owner[random.choice(WORDS[:4]) + str(key)] = owner.pop(key)
    elif kind == 1:
        owner.insert(key, copy.deepcopy(old))
    elif kind == 2 and isinstance(owner, dict):
        owner[key], other = copy.deepcopy(owner[random.choice(list(owner))]), old
        owner[f"{key}_"] = other
    elif kind <= 4:
        owner[key] = any_value(random)
    else:
        owner[key] = _like(random, old)


def _like(random: Random, old: Any) -> Any:
    """Another value of the type of ``old``."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return random.choice((old + 1, old - 1, old * 2, old // 2, -old, *NUMBERS))
    if isinstance(old, float):
        return random.choice((old * 2, -old, *FLOATS))
    if isinstance(old, str):
        return random.choice((old + "x", old[:-1], old.upper(), *WORDS))
    if isinstance(old, list):
        return random.choice((old[1:], old[:-1], old + old, old[::-1], [*old, None], []))
    if isinstance(old, dict):
        return dict(list(old.items())[random.randrange(len(old) + 1) :])
    return any_value(random)


def any_value(random: Random) -> Any:
    """A value of any type, most often one that is at the end of something."""
    return random.choice((*NUMBERS, *FLOATS, *WORDS, *OTHERS))


def mutated_json(random: Random, data: bytes, below: Path = ()) -> bytes:
    """The JSON text ``data`` with its values changed, or seldom its bytes.

    Args:
        below: path of the part in which values are changed.
    """
    if random.random() < 0.15:
        return mutated_bytes(random, data)
    try:
        value = json.loads(data)
    except ValueError:
        return mutated_bytes(random, data)
    return json.dumps(mutated_value(random, value, below)).encode()


def mutated_bytes(random: Random, data: bytes) -> bytes:
    """Bytes of ``data`` flipped, cut, repeated or put around it."""
    change: Callable[[Random, bytes], bytes] = random.choice(
        (_flipped, _flipped, _flipped, _cut, _repeated, _wrapped)
    )
    return change(random, data)


def _flipped(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        if changed:
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _cut(random: Random, data: bytes) -> bytes:
    return data[: random.choice((0, 1, len(data) // 2, len(data) - 1, random.randrange(9)))]


def _repeated(random: Random, data: bytes) -> bytes:
    start = random.randrange(len(data) + 1)
    return data[:start] + data[start : start + random.randrange(64)] * 2 + data[start:]


def _wrapped(random: Random, data: bytes) -> bytes:
    return random.choice(
        (
            b"\xef\xbb\xbf" + data,
            b"\xff\xfe" + data,
            data + b"\xe9",
            b"[" * DEEP + data,
            b'{"x":' * DEEP + b"1" + b"}" * DEEP,
            data.replace(b"{", b'{"x": 1, "x": 2, ', 1),
            data.replace(b":", b": NaN,", 1),
            b"\x00" * len(data),
        )
    )
