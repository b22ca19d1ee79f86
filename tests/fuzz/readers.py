"""Every reader of what a person may give: a file, or a request to the server. Used by test_readers.py and run.py.

A reader may raise ValueError, FileNotFoundError or another OSError, in one line, or MemoryError with a message.
Anything else is a fault: another exception, more than five seconds, a signal, or more memory than `allowed` says. What
was found that way stands in found.py.
"""

from __future__ import annotations

import asyncio
import bz2
import contextlib
import functools
import gzip
import hashlib
import json
import lzma
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from fuzz.files import RECORDS, zstandard
from fuzz.mutations import Mutation, in_json, in_json_lines, in_packed, in_protobuf, in_safetensors, mutated

from hrmcore.checkpoint.hrm_text import Arrays, read_config
from hrmcore.checkpoint.training_state import load_state, read_metadata
from hrmcore.config import HRMConfig
from hrmcore.data.records import Record, Rejected, read_records
from hrmcore.data.store import open_store, verify
from hrmcore.engine.async_engine import AsyncEngine
from hrmcore.engine.chat_template import ChatTemplate, Conversation
from hrmcore.engine.engine import load
from hrmcore.engine.packed_file import PACKED_FILE, read_header
from hrmcore.engine.runner import PAGE
from hrmcore.limits import MOST_PARSED
from hrmcore.model import HRM
from hrmcore.serving.app import Service, make_app
from hrmcore.tokenizer import Tokenizer
from hrmcore.train.run_file import read_config as read_run_file

SECONDS = 5.0

# What a reader may take besides four times its file, and besides what a configuration asks for (`_config_asks`). 48
# bytes for each that is parsed at once: hrmcore/limits.py. And what is the same for every file: pages of libraries that
# are touched for the first time, stacks, free lists.
PARSED = 48
SAME = 32 << 20


def _as_they_are(data: bytes) -> bytes:
    return data


@dataclass(frozen=True)
class Reader:
    """The file in the folder of `make_files` and what reads it.

    `inside` breaks what the file means, beside `mutated`, which breaks its bytes; both get the file `unpacked`. `sign`
    makes a file of what they give: packs it again, or mends its checksums. `asks` is what else its content asks for.
    """

    file: str
    read: Callable[[Path], object]
    inside: Mutation = mutated
    unpack: Callable[[bytes], bytes] = _as_they_are
    sign: Callable[[bytes], bytes] = _as_they_are
    asks: Callable[[Path], int] = lambda folder: 0

    def broken(self, whole: bytes, chance: random.Random) -> bytes:
        """A file that is not whole any more."""
        if chance.random() < 0.2:
            return mutated(whole, chance)
        return self.sign(chance.choice([mutated, self.inside])(self.unpack(whole), chance))

    def allowed(self, size: int, folder: Path) -> int:
        """Bytes of memory that reading a file of this size may take at most."""
        parsed = MOST_PARSED if self.unpack is not _as_they_are else min(size, MOST_PARSED)
        return 4 * size + PARSED * parsed + SAME + self.asks(folder)


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


def _signed_manifest(data: bytes) -> bytes:
    """A sharded state's manifest with its own checksum, where it can be read."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        manifest = json.loads(data)
        del manifest["sha256"]
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        return json.dumps({**manifest, "sha256": digest}).encode()
    return data


def _read_all(folder: Path) -> None:
    arrays = Arrays(folder)
    for name in arrays:
        assert arrays[name].shape


def _load(folder: Path) -> None:
    engine = load(folder)
    with contextlib.suppress(ArithmeticError):  # finite weights, but their products are not
        list(engine.tokens([1, 2, 3], max_new_tokens=2, ignore_eos=True))


def _config_asks(config: HRMConfig) -> int:
    """What a configuration asks for, whatever the size of its file.

    Four tables of its rotations, and the page of the cache in which the few tokens of `_load` lie, in float32.
    """
    page = 2 * config.cache_slots * PAGE * config.attention_width * 4
    return 4 * 4 * config.context * config.head_dim + page


def _checkpoint_asks(folder: Path) -> int:
    with contextlib.suppress(ValueError, OSError):
        return _config_asks(read_config(folder))
    return 0


def _packed_asks(folder: Path) -> int:
    with contextlib.suppress(ValueError, OSError):
        return _config_asks(read_header(folder / "packed" / PACKED_FILE).config)
    return 0


def _use_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    tokenizer.decode(tokenizer.prompt("what is 3 plus 4? é")[:50])
    tokenizer.control_tokens()


def _use_template(folder: Path) -> None:
    messages = [{"role": "user", "content": "copy <boq>"}, {"role": "assistant", "content": "7"}]
    template = ChatTemplate.find(folder)
    if template is not None:
        Conversation(template, [*messages, messages[0]]).ids(Tokenizer.load(folder.parent), "direct")


def _records(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        assert all(isinstance(record, Record) for record in read_records(folder / "records" / name, Rejected()))

    return read


def _read_store(folder: Path) -> None:
    open_store(folder / "store")
    verify(folder / "store")


def _arrays_of_a_store(folder: Path) -> None:
    """As if the manifest had been written of what lies there now."""
    manifest = folder / "store/manifest.json"
    whole = manifest.read_bytes()
    values = json.loads(whole)
    for name, entry in values["files"].items():
        data = (folder / "store" / name).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    try:
        manifest.write_text(json.dumps(values))
        _read_store(folder)
    finally:
        manifest.write_bytes(whole)


SHARDS = "step-00000003"
SHARD = "shard-00001-model-00001-of-00001.safetensors"


def _shards(folder: Path) -> None:
    """As if the manifest had been written of what lies there now."""
    manifest = folder / SHARDS / "state.json"
    whole = manifest.read_bytes()
    values = json.loads(whole)
    values["files"] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (folder / SHARDS).iterdir()
        if path != manifest
    }
    try:
        manifest.write_bytes(_signed_manifest(json.dumps(values).encode()))
        load_state(folder / SHARDS)
    finally:
        manifest.write_bytes(whole)


@functools.cache
def _application(folder: Path) -> Any:
    return make_app(Service(AsyncEngine(load(folder)), "small"))


def _request(name: str, path: str) -> Callable[[Path], None]:
    """The server's answer to a body: one that is refused is a ValueError."""

    async def ask(application: Any, body: bytes) -> tuple[int, bytes]:
        sent: list[dict[str, Any]] = []
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if not parts:
                await asyncio.Event().wait()
            return parts.pop()

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
        scope |= {"headers": [(b"content-type", b"application/json")], "root_path": "", "scheme": "http"}
        await application({**scope, "asgi": {"version": "3.0"}, "http_version": "1.1"}, receive, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)

    def read(folder: Path) -> None:
        status, said = asyncio.run(ask(_application(folder), (folder / name).read_bytes()))
        assert status < 500, f"{status}: {said!r}"
        if status != 200:
            raise ValueError(json.loads(said)["error"]["message"])
        assert b"server_error" not in said, said

    return read


_PACKING: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    ".gz": (gzip.decompress, gzip.compress),
    ".bz2": (bz2.decompress, bz2.compress),
    ".xz": (lzma.decompress, lzma.compress),
    ".zst": (lambda data: pyarrow.input_stream(pyarrow.BufferReader(data), compression="zstd").read(), zstandard),
}
_INSIDE = {".jsonl": in_json_lines, ".json": in_json}


def _record_reader(name: str) -> Reader:
    path = Path(name)
    unpack, pack = _PACKING.get(path.suffix, (_as_they_are, _as_they_are))
    kind = (path.with_suffix("") if path.suffix in _PACKING else path).suffix
    return Reader(f"records/{name}", _records(name), _INSIDE.get(kind, mutated), unpack, pack)


READERS: dict[str, Reader] = {
    "config": Reader("config.json", read_config, in_json),
    "config_load": Reader("config.json", _load, in_json, asks=_checkpoint_asks),
    "generation_config": Reader("generation_config.json", read_config, in_json),
    "safetensors": Reader("model.safetensors", _read_all, in_safetensors),
    "load": Reader("model.safetensors", _load, in_safetensors, asks=_checkpoint_asks),
    "model": Reader("model.safetensors", HRM.from_pretrained, in_safetensors, asks=_checkpoint_asks),
    "index": Reader("sharded/model.safetensors.index.json", lambda folder: _read_all(folder / "sharded"), in_json),
    "packed": Reader(
        f"packed/{PACKED_FILE}",
        lambda folder: _load(folder / "packed"),
        in_packed,
        sign=_signed_pack,
        asks=_packed_asks,
    ),
    "sentencepiece": Reader("tokenizer.model", _use_tokenizer, in_protobuf),
    "tokenizer_json": Reader("json/tokenizer.json", lambda folder: _use_tokenizer(folder / "json"), in_json),
    "template": Reader("chat/chat_template.jinja", lambda folder: _use_template(folder / "chat")),
    "template_config": Reader("named/tokenizer_config.json", lambda folder: _use_template(folder / "named"), in_json),
    **{name: _record_reader(name) for name in RECORDS},
    "run_file": Reader("run.toml", lambda folder: read_run_file(folder / "run.toml")),
    "state": Reader(
        "state.safetensors",
        lambda folder: load_state(folder / "state.safetensors"),
        in_safetensors,
        sign=_signed_state,
    ),
    "metadata": Reader(
        "state.safetensors",
        lambda folder: read_metadata(folder / "state.safetensors"),
        in_safetensors,
        sign=_signed_state,
    ),
    "shards": Reader(f"{SHARDS}/{SHARD}", _shards, in_safetensors),
    "shards_manifest": Reader(
        f"{SHARDS}/state.json", lambda folder: load_state(folder / SHARDS), in_json, sign=_signed_manifest
    ),
    "manifest": Reader("store/manifest.json", _read_store, in_json),
    "tokens": Reader("store/tokens.npy", _arrays_of_a_store),
    "offsets": Reader("store/offsets.npy", _arrays_of_a_store),
    "chat": Reader("chat.json", _request("chat.json", "/v1/chat/completions"), in_json),
    "completions": Reader("completion.json", _request("completion.json", "/v1/completions"), in_json),
}


def try_reader(name: str, folder: Path, data: bytes) -> str | None:
    """Give a reader this file; what it did wrong in words, or None. The whole file stands there again afterwards."""
    reader = READERS[name]
    path, data = folder / reader.file, data.replace(b"{folder}", str(folder).encode())
    whole = path.read_bytes()
    try:
        path.write_bytes(data)
        reader.read(folder)
    except (ValueError, OSError, MemoryError) as error:
        said = str(error)
        if isinstance(error, UnicodeError) or not said.strip() or "\n" in said:
            return f"{type(error).__name__}: {error}"
        return None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return f"{type(error).__name__}: {error}"
    finally:
        path.write_bytes(whole)
    return None


def describe(value: object) -> str:
    """A value, shortened for a report."""
    text = repr(value)
    return text if len(text) < 300 else f"{text[:300]}…"
