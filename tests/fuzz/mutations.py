"""Files that differ from a whole one in a few places: in bytes, or in what the bytes mean."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

_NUMBERS = ["-1", "0", "1e39", "NaN", "Infinity", "-Infinity", str(1 << 31), str(1 << 61), str(1 << 63), "1" * 400]
_VALUES = [*_NUMBERS, "null", "true", "[]", "{}", '""', '"x"', "[" * 3000, '"\\ud800"', "[[1]]", '{"a": 1}']
# Among them the ends of the ranges in hrmcore/config.py and hrmcore/train/run_file.py, and what is just beyond.
_SIZES = [*(1 << n for n in (8, 16, 20, 24, 30, 31, 32, 40, 47, 62, 63, 64)), 10**30]
_STRANGE: list[Any] = [
    *(None, True, False, [], {}, "", "x", "\ud800", "\0", "é" * 300, 0, -1, 1, 2, 0.5, 1e-40, 1e39),
    *(float("nan"), float("inf"), [[1]], [None], {"a": 1}, ["a", 1]),
]


def mutated(whole: bytes, chance: random.Random) -> bytes:
    """Other bytes, or another value behind a colon or an equals sign."""
    data = bytearray(whole)
    for _ in range(chance.choice([1, 1, 1, 2, 3, 8])):
        at = chance.randrange(len(data) + 1) if chance.random() < 0.5 else chance.randrange(min(len(data), 2000) + 1)
        kind = chance.randrange(6)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] = chance.randrange(256)
        elif kind == 1:
            del data[at : at + chance.choice([1, 2, 8, 100, 1 << 20])]
        elif kind == 2:
            data[at:at] = bytes(chance.randrange(256) for _ in range(chance.choice([1, 4, 8])))
        elif kind == 3:
            start = chance.randrange(len(data) + 1)
            data[at:at] = data[start : start + chance.choice([1, 16, 200])]
        else:
            _replace_value(data, chance)
    return bytes(data)


def _replace_value(data: bytearray, chance: random.Random) -> None:
    """What stands behind a colon or an equals sign, in a text or a header, becomes another value."""
    places = [i for i, byte in enumerate(data[:20_000]) if byte in b":="]
    if not places:
        return
    start = chance.choice(places) + 1
    end = start
    while end < len(data) and data[end] not in b",}\n":
        end += 1
    data[start:end] = chance.choice(_VALUES).encode()


def in_json(whole: bytes, chance: random.Random) -> bytes:
    """JSON in which a few values, keys or elements are others."""
    value = json.loads(whole)
    for _ in range(chance.choice([1, 1, 2, 4])):
        value = _changed(value, chance)
    return json.dumps(value, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")


def in_json_lines(whole: bytes, chance: random.Random) -> bytes:
    """A line of which the JSON is another."""
    lines = whole.splitlines(keepends=True)
    at = chance.randrange(min(len(lines), 4))
    lines[at] = in_json(lines[at], chance) + b"\n"
    return b"".join(lines)


def in_safetensors(whole: bytes, chance: random.Random) -> bytes:
    """Another header, of the right length, before the same tensors."""
    length = int.from_bytes(whole[:8], "little")
    header = in_json(whole[8 : 8 + length], chance)
    return len(header).to_bytes(8, "little") + header + whole[8 + length :]


def in_packed(whole: bytes, chance: random.Random) -> bytes:
    """Another header in a packed file, of the right length, with the weights where they begin behind it."""
    length = int.from_bytes(whole[12:16], "little")
    header = in_json(whole[48 : 48 + length], chance)
    begin, end = (-(-(48 + n) // 4096) * 4096 for n in (length, len(header)))
    return (whole[:12] + struct.pack("<I", len(header)) + whole[16:48] + header).ljust(end, b"\0") + whole[begin:]


def _changed(value: Any, chance: random.Random) -> Any:
    """The value, or one within it, replaced; objects lose, gain and rename keys, lists elements."""
    if isinstance(value, dict) and value:
        key = chance.choice(list(value))
        kind = chance.randrange(12)
        rest = {name: own for name, own in value.items() if name != key}
        if kind == 0:
            return rest
        if kind == 1:
            return {**rest, chance.choice(["", "x", key[:-1], key.upper(), "__metadata__"]): value[key]}
        if kind == 2:
            return {**value, chance.choice(["", "x", f"{key}2"]): chance.choice(list(value.values()))}
        return {**value, key: _changed(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        kind = chance.randrange(6)
        if kind == 0:
            return value[:at] + value[at + 1 :]
        if kind == 1:
            return value[:at] + [value[at]] * chance.choice([2, 3, 100]) + value[at:]
        return [*value[:at], _changed(value[at], chance), *value[at + 1 :]]
    return _other(value, chance)


def _other(value: Any, chance: random.Random) -> Any:
    kind = chance.randrange(4)
    if kind == 0:
        return chance.choice(_STRANGE)
    if isinstance(value, str) and kind == 1:
        at = chance.randrange(len(value) + 1)
        return value[:at] + chance.choice(["\0", "\ud800", "\U0001f600", "(", "*", "<boq>", "\n", ""]) + value[at + 1 :]
    if isinstance(value, int | float) and not isinstance(value, bool) and kind < 3:
        return chance.choice([value + 1, value - 1, 2 * value, -value, value * 1.5])
    return chance.choice(_SIZES) - chance.randrange(2)


def in_protobuf(whole: bytes, chance: random.Random) -> bytes:
    """A protocol buffer of which a few fields, at the top or one level below, are others."""
    fields = _fields(whole)
    for _ in range(chance.choice([1, 1, 2, 6])):
        at = chance.randrange(len(fields))
        kind, (number, wire, value) = chance.randrange(5), fields[at]
        if kind == 0:
            del fields[at : at + chance.choice([1, 1, 50])]
        elif kind == 1:
            fields[at:at] = [fields[chance.randrange(len(fields))]] * chance.choice([1, 2, 100])
        elif wire == 2 and isinstance(value, bytes) and kind < 4 and (inner := _fields(value)):
            place = chance.randrange(len(inner))
            inner[place] = _other_field(*inner[place], chance)
            fields[at] = (number, wire, b"".join(map(_encoded, inner)))
        else:
            fields[at] = _other_field(number, wire, value, chance)
        if not fields:
            break
    return b"".join(map(_encoded, fields))


_Field = tuple[int, int, int | bytes]


def _other_field(number: int, wire: int, value: int | bytes, chance: random.Random) -> _Field:
    if isinstance(value, int):
        return (number, wire, chance.choice([0, 1, value + 1, (1 << 31) - 1, 1 << 31, (1 << 64) - 1]))
    if wire == 2:
        return (
            number,
            wire,
            chance.choice([b"", b"\xff", value * 2, mutated(value, chance), value[: len(value) // 2]]),
        )
    return (number, wire, bytes(chance.choice([0, 255, 127]) for _ in value))


def _fields(data: bytes) -> list[_Field]:
    """The fields of a message; none where it is no message."""
    found: list[_Field] = []
    place = 0
    try:
        while place < len(data):
            tag, place = _varint(data, place)
            number, wire = tag >> 3, tag & 7
            if wire == 0:
                value, place = _varint(data, place)
                found.append((number, wire, value))
                continue
            if wire == 2:
                size, place = _varint(data, place)
            else:
                size = {1: 8, 5: 4}[wire]
            if place + size > len(data):
                return []
            found.append((number, wire, data[place : place + size]))
            place += size
    except (IndexError, KeyError):
        return []
    return found


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value, place, shift = value | (byte & 127) << shift, place + 1, shift + 7
        if byte < 128:
            return value, place


def _encoded(field: _Field) -> bytes:
    number, wire, value = field
    head = _as_varint(number << 3 | wire)
    if isinstance(value, int):
        return head + _as_varint(value)
    return head + (_as_varint(len(value)) if wire == 2 else b"") + value


def _as_varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while True:
        out.append(value & 127 | (128 if value > 127 else 0))
        value >>= 7
        if not value:
            return bytes(out)
