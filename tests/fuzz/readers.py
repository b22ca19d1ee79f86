"""Every reader of a file that a person may give, with a whole file to begin from. Used by test_readers.py and run.py.

A reader may raise ValueError, FileNotFoundError or another OSError, in one line. Anything else is a fault: another
exception, more than five seconds, a signal. What was found that way stands in FOUND.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hrmcore.checkpoint.hrm_text import Arrays, read_config, save_model
from hrmcore.checkpoint.training_state import load_state, read_metadata, save_state
from hrmcore.config import HRMConfig
from hrmcore.data.records import Record, Rejected, read_records
from hrmcore.data.store import open_store
from hrmcore.engine.cpu_runner import convert
from hrmcore.engine.engine import load
from hrmcore.engine.packed_file import PACKED_FILE
from hrmcore.model import HRM
from hrmcore.tokenizer import Tokenizer, train_tokenizer
from hrmcore.train.run_file import read_config as read_run_file

SECONDS = 5.0
TEXTS = [f"what is {i} plus {j}? é{i} copy {i} {j}" for i in range(20) for j in range(20)]
RUN = """
train_files = ["{folder}/train.jsonl"]
tokenizer = "{folder}"
out = "{folder}/out"
steps = 12
betas = [0.9, 0.95]
[model]
hidden_size = 32
intermediate_size = 64
num_layers_per_stack = 1
num_attention_heads = 2
head_dim = 16
[[grow]]
at_tokens = 100
hidden_size = 64
"""


HUGE = RUN.replace("hidden_size = 64", f"hidden_size = {10**400}").encode()


@dataclass(frozen=True)
class Reader:
    """The file in the folder of `make_files`, what reads it, and whether its own checksum is to be mended."""

    file: str
    read: Callable[[Path], object]
    sign: Callable[[bytes], bytes] = bytes


def _signed_pack(data: bytes) -> bytes:
    """With the checksum and the length that belong to whatever stands where the header does."""
    if len(data) < 48:
        return data
    length = min(int.from_bytes(data[12:16], "little"), len(data) - 48)
    text = data[48 : 48 + length].rstrip(b"\0")
    return data[:12] + struct.pack("<I32s", len(text), hashlib.sha256(text).digest()) + text + data[48 + len(text) :]


def _signed_state(data: bytes) -> bytes:
    """With the checksum that belongs to the header, where it can be read."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        metadata = entries.pop("__metadata__")
        metadata["sha256"] = hashlib.sha256(data[8 + length :]).hexdigest()
        rest = {key: value for key, value in metadata.items() if key != "header_sha256"}
        digest = hashlib.sha256(json.dumps([rest, entries], sort_keys=True).encode()).hexdigest()
        text = json.dumps({**entries, "__metadata__": {**rest, "header_sha256": digest}}).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]
    return data


def _read_all(folder: Path) -> None:
    arrays = Arrays(folder)
    for name in arrays:
        assert arrays[name].shape


def _use_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    tokenizer.decode(tokenizer.prompt("what is 3 plus 4? é")[:50])


def _read_records(folder: Path) -> None:
    assert all(isinstance(record, Record) for record in read_records(folder / "train.jsonl", Rejected()))


READERS: dict[str, Reader] = {
    "config": Reader("config.json", read_config),
    "safetensors": Reader("model.safetensors", _read_all),
    "load": Reader("model.safetensors", load),
    "index": Reader("sharded/model.safetensors.index.json", lambda folder: _read_all(folder / "sharded")),
    "packed": Reader(f"packed/{PACKED_FILE}", lambda folder: load(folder / "packed"), _signed_pack),
    "sentencepiece": Reader("tokenizer.model", _use_tokenizer),
    "tokenizer_json": Reader("json/tokenizer.json", lambda folder: _use_tokenizer(folder / "json")),
    "records": Reader("train.jsonl", _read_records),
    "run_file": Reader("run.toml", lambda folder: read_run_file(folder / "run.toml")),
    "state": Reader("state.safetensors", lambda folder: load_state(folder / "state.safetensors"), _signed_state),
    "metadata": Reader("state.safetensors", lambda folder: read_metadata(folder / "state.safetensors"), _signed_state),
    "manifest": Reader("store/manifest.json", lambda folder: open_store(folder / "store")),
}

# What was found, before it was mended.
FOUND: dict[str, list[bytes]] = {
    "config": [b"[" * 100_000, b'{"H_cycles": 2305843009213693952}', b"{}"],
    "packed": [
        b"HRMPACK\0\1\0\0\0" + struct.pack("<I32s", 9999, bytes(32)) + text.ljust(200)
        for text in (b"[]", b"1", b"null", b"[" * 5000, b'{"config": {}, "dtype": [], "bytes": -1, "checksum": NaN}')
    ],
    "records": [b'{"instruction": ' + b"[" * 100_000 + b"\n"],
    "tokenizer_json": [b'{"model": {"type": "WordLevel", "vocab": {"<boq>": 0, "<eoq>": 1, "<eoa>": 2}}}'],
    "run_file": [b"seed = " + b"[" * 5000, b"learning_rate = " + b"9" * 400, b"betas = [nan, nan]", HUGE],
    "state": [(100_000).to_bytes(8, "little") + b"[" * 100_000, b"", b"\0" * 8],
    "manifest": [b"[" * 100_000, b'{"format": 1, "files": {"tokens.npy": {"bytes": "1", "sha256": 1}}}'],
}


def make_files(folder: Path) -> None:
    """One whole file for each reader."""
    from tokenizers import Tokenizer as Json
    from tokenizers import models, pre_tokenizers

    from hrmcore.data.prepare import prepare

    tokenizer = train_tokenizer(TEXTS, folder, vocab_size=300)
    torch.manual_seed(0)
    model = HRM(HRMConfig(tokenizer.vocab_size, 32, 48, 1, 2, 16, max_position_embeddings=128))
    save_model(model, folder)
    convert(folder, folder / "packed", "int8")
    save_model(model, folder / "sharded")
    names = json.loads((folder / "sharded/model.safetensors").read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    names.pop("__metadata__", None)
    index = {"weight_map": dict.fromkeys(names, "all.safetensors")}
    (folder / "sharded/model.safetensors").rename(folder / "sharded/all.safetensors")
    (folder / "sharded/model.safetensors.index.json").write_text(json.dumps(index))
    words = ["<boq>", "<eoq>", "<eoa>", "<direct>", "what", "is", "3", "?", "[UNK]"]
    (folder / "json").mkdir()
    spoken = Json(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    spoken.pre_tokenizer = pre_tokenizers.Whitespace()
    spoken.save(str(folder / "json/tokenizer.json"))
    lines = [json.dumps({"instruction": text, "response": "7"}) for text in TEXTS[:50]]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "run.toml").write_text(RUN.format(folder=folder))
    save_state(folder / "state.safetensors", {"model.w": torch.ones(3, 4)}, {"step": "3", "model_config": "{}"})
    prepare([folder / "train.jsonl"], folder / "store", tokenizer=folder, context=128, workers=1)


def try_reader(name: str, folder: Path, data: bytes) -> str | None:
    """Give a reader this file; what it did wrong in words, or None. The whole file stands there again afterwards."""
    reader = READERS[name]
    path, data = folder / reader.file, data.replace(b"{folder}", str(folder).encode())
    whole = path.read_bytes()
    try:
        path.write_bytes(data)
        reader.read(folder)
    except (ValueError, OSError) as error:
        if isinstance(error, UnicodeError) or not str(error).strip():
            return f"{type(error).__name__}: {error}"
        return None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return f"{type(error).__name__}: {error}"
    finally:
        path.write_bytes(whole)
    return None


_NUMBERS = ["-1", "0", "1e39", "NaN", "Infinity", "-Infinity", str(1 << 31), str(1 << 61), str(1 << 63), "1" * 400]
_VALUES = [*_NUMBERS, "null", "true", "[]", "{}", '""', '"x"', "[" * 3000, '"\\ud800"', "[[1]]", '{"a": 1}']


def mutated(whole: bytes, chance: random.Random) -> bytes:
    """A file that differs from a whole one in a few places: bytes, numbers, values, or pieces of it."""
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


def describe(value: object) -> str:
    """A value, shortened for a report."""
    text = repr(value)
    return text if len(text) < 300 else f"{text[:300]}…"
