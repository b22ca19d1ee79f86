"""One whole file of every kind that a person may give."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import torch
from pyarrow import parquet

from hrmcore.checkpoint.hrm_text import save_model
from hrmcore.checkpoint.sharded_state import save_shards
from hrmcore.checkpoint.training_state import save_state
from hrmcore.config import HRMConfig
from hrmcore.data.prepare import prepare
from hrmcore.engine.cpu_runner import convert
from hrmcore.model import HRM
from hrmcore.tokenizer import train_tokenizer

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
TEMPLATE = """{%- for message in messages %}{% if message.role == 'user' %}<boq>{{ message.content|trim }}<eoq>
{%- elif message.role != 'assistant' %}{{ raise_exception('no ' ~ message.role) }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<eoa>{{ bos_token }}{% endif %}"""
CHAT = {
    "model": "small",
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "copy"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "what is 3 plus 4? é"},
    ],
    **{"max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "n": 2},
    **{"stop": ["7", "é"], "repetition_penalty": 1.1, "condition": "direct", "stream": False, "user": "somebody"},
    **{"logit_bias": {}, "tools": [], "response_format": {"type": "text"}, "frequency_penalty": 0},
}
COMPLETION = {
    "prompt": ["copy", "what is 3?"],
    "max_tokens": 2,
    "stream": True,
    "stream_options": {"include_usage": True},
}

Rows = list[dict[str, Any]]


def rows_of(shape: str) -> Rows:
    """Fifty records in one of the shapes that hrmcore/data/shapes.py knows."""
    if shape == "plain":
        return [{"instruction": text, "response": "7", "context": "é", "condition": "direct"} for text in TEXTS[:50]]
    if shape == "alpaca":
        return [{"instruction": text, "input": "3", "output": "7"} for text in TEXTS[:50]]
    if shape == "prompt":
        return [{"prompt": text, "completion": "7", "id": 1} for text in TEXTS[:50]]
    names = ("from", "value", "human", "gpt") if shape == "conversations" else ("role", "content", "user", "assistant")
    role, content, asks, says = names
    turns = [(asks, "3?"), (says, "7"), (asks, "é?"), (says, "8")]
    return [{shape: [{role: who, content: f"{what} {i}"} for who, what in turns]} for i in range(50)]


def json_lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def json_array(rows: Rows) -> bytes:
    return json.dumps(rows, indent=1, ensure_ascii=False).encode()


def table(rows: Rows, delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows([rows[0].keys(), *(row.values() for row in rows)])
    return text.getvalue().encode()


def as_parquet(rows: Rows) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def zstandard(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


# The file's name: its whole content.
RECORDS: dict[str, Callable[[], bytes]] = {
    "plain.jsonl": lambda: json_lines(rows_of("plain")),
    "alpaca.jsonl": lambda: json_lines(rows_of("alpaca")),
    "prompt.jsonl": lambda: json_lines(rows_of("prompt")),
    "messages.jsonl": lambda: json_lines(rows_of("messages")),
    "conversations.jsonl": lambda: json_lines(rows_of("conversations")),
    "plain.json": lambda: json_array(rows_of("plain")),
    "messages.json": lambda: json_array(rows_of("messages")),
    "plain.csv": lambda: table(rows_of("plain"), ","),
    "alpaca.tsv": lambda: table(rows_of("alpaca"), "\t"),
    "plain.parquet": lambda: as_parquet(rows_of("plain")),
    "messages.parquet": lambda: as_parquet(rows_of("messages")),
    "plain.jsonl.gz": lambda: gzip.compress(json_lines(rows_of("plain")), mtime=0),
    "plain.json.xz": lambda: lzma.compress(json_array(rows_of("plain"))),
    "plain.csv.bz2": lambda: bz2.compress(table(rows_of("plain"), ",")),
    "plain.jsonl.zst": lambda: zstandard(json_lines(rows_of("plain"))),
}


def make_files(folder: Path) -> None:
    """One whole file for each reader."""
    tokenizer = train_tokenizer(TEXTS, folder, vocab_size=300)
    torch.manual_seed(0)
    model = HRM(HRMConfig(tokenizer.vocab_size, 32, 48, 1, 2, 16, max_position_embeddings=128))
    save_model(model, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3], "temperature": 0.7}')
    convert(folder, folder / "packed", "int8")
    _make_sharded(model, folder / "sharded")
    _make_tokenizer_json(folder / "json")
    (folder / "records").mkdir()
    for name, content in RECORDS.items():
        (folder / "records" / name).write_bytes(content())
    (folder / "train.jsonl").write_bytes(json_lines(rows_of("plain")))
    (folder / "run.toml").write_text(RUN.format(folder=folder))
    state = {"model.w": torch.ones(3, 4), "optimizer.m.w": torch.zeros(3, 4)}
    save_state(folder / "state.safetensors", state, {"step": "3", "model_config": "{}"})
    save_shards(folder / "step-00000003", state, {"step": "3", "model_config": "{}"})
    prepare([folder / "train.jsonl"], folder / "store", tokenizer=folder, context=128, workers=1)
    (folder / "chat").mkdir()
    (folder / "chat/chat_template.jinja").write_text(TEMPLATE)
    (folder / "named").mkdir()
    named = {"chat_template": [{"name": "default", "template": TEMPLATE}], "bos_token": {"content": "<boq>"}}
    (folder / "named/tokenizer_config.json").write_text(json.dumps(named))
    (folder / "chat.json").write_text(json.dumps(CHAT))
    (folder / "completion.json").write_text(json.dumps(COMPLETION))


def _make_sharded(model: HRM, folder: Path) -> None:
    save_model(model, folder)
    names = json.loads((folder / "model.safetensors").read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    names.pop("__metadata__", None)
    index = {"weight_map": dict.fromkeys(names, "all.safetensors")}
    (folder / "model.safetensors").rename(folder / "all.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _make_tokenizer_json(folder: Path) -> None:
    """One of byte pairs, as the released checkpoints bring it."""
    from tokenizers import Tokenizer as Json
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    folder.mkdir()
    words = ["<boq>", "<eoq>", "<eoa>", "<direct>"]
    spoken = Json(models.BPE(unk_token=None))
    spoken.normalizer = normalizers.NFC()
    spoken.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(r"\d|\s+", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    spoken.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    spoken.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=words, initial_alphabet=alphabet)
    )
    spoken.enable_padding(length=8)
    spoken.enable_truncation(4)
    spoken.save(str(folder / "tokenizer.json"))
