"""A checkpoint's tokenizer as the vocabulary of a GGUF file. Imports no torch.

A sentencepiece model becomes llama.cpp's tokenizer "llama", a byte-level BPE its "gpt2" where llama.cpp knows the rule
that cuts the text. Any other has no counterpart there: such a file takes token ids alone.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hrmcore.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # GGUF's kinds of tokens, and sentencepiece's

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The rules by which a byte-level BPE cuts a text, under llama.cpp's names.
_CUTS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}": "qwen2",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
}


@dataclass
class Vocabulary:
    """Tokens by id: text, kind (as above) and score; `model` and `cut` are llama.cpp's names of the tokenizer."""

    model: str
    cut: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)

    def filled(self, size: int) -> Vocabulary:
        """With ids that no text gives up to `size`, the rows of a model's head."""
        missing = range(len(self.tokens), size)
        self.tokens += [f"[unused {index}]" for index in missing]
        self.kinds += [UNUSED] * len(missing)
        if self.scores:
            self.scores += [0.0] * len(missing)
        return self


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary | None:
    """The vocabulary of a tokenizer; None where llama.cpp has no tokenizer that cuts texts as it does."""
    path = tokenizer.source
    made = _sentencepiece(path) if path.name == "tokenizer.model" else _byte_level(path)
    if made is not None:
        for index in tokenizer.special_ids:
            made.kinds[index] = CONTROL
    return made


def chat_template(tokenizer: Tokenizer, vocabulary: Vocabulary) -> str:
    """`hrmcore.chat.render` between the framing tokens, in the language of chat templates."""
    condition = tokenizer.condition_ids.get("direct")
    opening = [tokenizer.boq] if condition is None else [tokenizer.boq, condition]
    opened = "".join(vocabulary.tokens[index] for index in opening)
    return (
        f"{{{{ '{opened}' }}}}"
        "{% if messages | length == 1 %}{{ messages[0]['content'] }}"
        "{% else %}{% for message in messages %}"
        "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ 'User: ' }}"
        "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' }}{% endif %}"
        "{{ message['content'] }}{% endfor %}{% endif %}"
        f"{{{{ '{vocabulary.tokens[tokenizer.eoq]}' }}}}"
    )


def _sentencepiece(path: Path) -> Vocabulary:
    tokens, scores, kinds = [], [], []
    for number, value in _fields(path.read_bytes()):
        if number == 1 and isinstance(value, bytes):  # ModelProto.pieces
            piece = dict(_fields(value))
            text, kind = bytes(piece[1]).decode(), int(piece.get(3, NORMAL))
            tokens.append(text.replace("\u2581", " ") if kind == USER_DEFINED else text)
            scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
            kinds.append(kind)
    return Vocabulary("llama", "default", tokens, kinds, scores)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message's fields: a number, or the bytes of a text, a message or a float."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        length = {1: 8, 5: 4}.get(key & 7) or varint()
        yield key >> 3, message[at : at + length]
        at += length


def _byte_level(path: Path) -> Vocabulary | None:
    """Of a tokenizer.json that is a byte-level BPE."""
    values = json.loads(path.read_text(encoding="utf-8"))
    model = values["model"]
    cut = _cut(values.get("pre_tokenizer") or {})
    normal = (values.get("normalizer") or {}).get("type", "NFC")
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or cut is None or normal != "NFC":
        return None
    added = {token["id"]: token for token in values.get("added_tokens", [])}
    ids = {index: token for token, index in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    size = 1 + max(ids)
    tokens = [ids.get(index, f"[unused {index}]") for index in range(size)]
    kinds = [NORMAL if index in ids else UNUSED for index in range(size)]
    for index, token in added.items():
        kinds[index] = CONTROL if token.get("special") else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary("gpt2", cut, tokens, kinds, merges=merges)


def _cut(rule: dict[str, Any]) -> str | None:
    """llama.cpp's name of a pre-tokenizer; None where it has none."""
    if rule.get("type") == "ByteLevel":
        return "gpt-2" if rule.get("use_regex", True) and not rule.get("add_prefix_space") else None
    parts = rule.get("pretokenizers", []) if rule.get("type") == "Sequence" else []
    if [part.get("type") for part in parts] != ["Split", "ByteLevel"]:
        return None
    split, last = parts
    plain = split.get("behavior") == "Isolated" and not split.get("invert") and not last.get("use_regex", True)
    return _CUTS.get(split["pattern"].get("Regex", "")) if plain and not last.get("add_prefix_space") else None
