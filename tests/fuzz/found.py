"""The corpus: what was found, before it was mended, by the reader that stumbled over it."""

from __future__ import annotations

import gzip
import json
import struct

from fuzz.files import RUN

HUGE = RUN.replace("hidden_size = 64", f"hidden_size = {10**400}").encode()


def _headed(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def _twice_byte_level() -> bytes:
    """What the tokenizers library does not come to an end with, taking all memory."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Split", "pattern": {"String": "x"}, "behavior": "Isolated", "invert": False}
    vocabulary = {"<boq>": 0, "<eoq>": 1, "<eoa>": 2, "<direct>": 3}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": False}
    return json.dumps(
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level, level]}, "model": model}
    ).encode()


# Its checksums are mended before it is read: the library's message had a line for the dtype's.
_STATE = _headed(
    json.dumps(
        {
            "__metadata__": {"format": "hrmcore-training-state", "version": "1"},
            "model.w": {"dtype": "F32\n", "shape": [1], "data_offsets": [0, 4]},
        }
    ).encode()
) + bytes(4)

FOUND: dict[str, list[bytes]] = {
    "config": [b"[" * 100_000, b'{"H_cycles": 2305843009213693952}', b"{}"],
    "index": [b'{"weight_map": {"lm_head.weight": "a\nl.safetensors"}}'],
    "packed": [
        b"HRMPACK\0\1\0\0\0" + struct.pack("<I32s", 9999, bytes(32)) + text.ljust(200)
        for text in (b"[]", b"1", b"null", b"[" * 5000, b'{"config": {}, "dtype": [], "bytes": -1, "checksum": NaN}')
    ],
    "plain.jsonl": [b'{"instruction": ' + b"[" * 100_000 + b"\n"],
    "plain.parquet": [b"PAR1" + bytes(60) + b"PAR1"],
    "tokens": [b"\x93NUMPY\x01\x00v\x00{'descr': (" + b" " * 104 + b"\n"],
    "tokenizer_json": [
        b'{"model": {"type": "WordLevel", "vocab": {"<boq>": 0, "<eoq>": 1, "<eoa>": 2}}}',
        _twice_byte_level(),
        b'{"version": "\n1"}',
    ],
    "run_file": [b"seed = " + b"[" * 5000, b"learning_rate = " + b"9" * 400, b"betas = [nan, nan]", HUGE],
    "state": [(100_000).to_bytes(8, "little") + b"[" * 100_000, b"", b"\0" * 8, _STATE],
    "shards_manifest": [b"[" * 100_000, b'{"format": "hrmcore-sharded-training-state", "version": "1"}'],
    "manifest": [b"[" * 100_000, b'{"format": 1, "files": {"tokens.npy": {"bytes": "1", "sha256": 1}}}'],
    "chat": [b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1%s}' % (b"0" * 400)],
    "template": [b"\xff"],
    "template_config": [b"[" * 100_000, b'{"chat_template": [{"name": []}]}', b"\xff"],
}


_SHORT_LINES = b'{"k%d": 1}\n'
# Large files that took more than four times their size, or than 48 times of what is parsed at once.
MEMORY: dict[str, list[bytes]] = {
    "config": [b'{"a": [' + b"[]," * 8_000_000 + b"1]}"],
    "safetensors": [_headed(b'{"a": [' + b"[]," * 8_000_000 + b"1]}")],
    "state": [_headed(b'{"a": [' + b"[]," * 8_000_000 + b"1]}")],
    "plain.jsonl": [
        b'{"instruction": "a", "b": [' + b"[]," * 8_000_000 + b"1]}\n",
        b"".join(_SHORT_LINES % number for number in range(800_000)),  # each line a reason of its own
    ],
    "plain.json": [
        b"[" + b" \n" * 8_000_000 + b'"\xf0\x9f\x98\x80"]',  # short lines, and a character that widens all others
        b'["' + b"a" * 24_000_000,
    ],
    "plain.csv": [b'instruction,response\n"' + b"a\n" * 12_000_000],  # a quote that nothing closes
    "plain.jsonl.gz": [gzip.compress(b" " * 400_000_000, 1, mtime=0)],
    "run_file": [b"".join(b"a%d.b = 1\n" % number for number in range(300_000))],
    "template_config": [b'{"a": [' + b"[]," * 8_000_000 + b"1]}"],
    "manifest": [b'{"a": [' + b"[]," * 8_000_000 + b"1]}"],
}
