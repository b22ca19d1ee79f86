"""Two kinds of tokenizer behind one interface, and the tokens that frame a prompt.

A sequence is `<boq> condition… instruction <eoq> response <eoa>`. Our own models bring `tokenizer.model`
(sentencepiece), released ones `tokenizer.json` (tokenizers). Imports no torch.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

# What a folder with a tokenizer may hold; copied together.
TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
)

CONDITIONS = ("direct", "cot", "synth", "noisy")

# How the released HRM-Text checkpoints spell the framing tokens (sapientinc/HRM-Text, data preparation).
RELEASED_NAMES = {
    "boq": "<|im_start|>",
    "eoq": "<|im_end|>",
    "eoa": "<|box_end|>",
    "direct": "<|object_ref_start|>",
    "cot": "<|object_ref_end|>",
    "noisy": "<|quad_start|>",
    "synth": "<|quad_end|>",
}
# How ours spell them; a tokenizer that has these is one of ours.
OWN_NAMES = {name: f"<{name}>" for name in ("boq", "eoq", "eoa", *CONDITIONS)}


class NoFramingError(ValueError):
    """A tokenizer that works but has no tokens to frame a prompt: it belongs to another kind of model."""


def tokenizer_files(folder: Path) -> list[Path]:
    """Those of TOKENIZER_FILES that a folder holds."""
    return [path for name in TOKENIZER_FILES if (path := folder / name).is_file()]


class _Backend(Protocol):
    """What the two libraries have in common."""

    vocab_size: int
    # The byte of each token that decodes only together with the whole run of such tokens that it stands in: a run that
    # is not UTF-8 loses all its characters.
    byte_fallback: Mapping[int, int]

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_id(self, token: str) -> int | None: ...
    def control_tokens(self) -> dict[str, int]: ...
    def has(self, index: int) -> bool: ...


class _SentencePiece:
    byte_fallback: Mapping[int, int] = {}  # a broken character costs its neighbours nothing

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError(f"{path}: not a sentencepiece model ({str(error).splitlines()[0]})") from None
        self.vocab_size: int = self._processor.vocab_size()
        try:
            self._pieces: list[str] = self._processor.id_to_piece(list(range(self.vocab_size)))
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not a sentencepiece model (a piece is not UTF-8)") from None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode(list(ids)))

    def token_id(self, token: str) -> int | None:
        index = int(self._processor.piece_to_id(token))
        return None if index == self._processor.unk_id() else index

    def control_tokens(self) -> dict[str, int]:
        return {piece: index for index, piece in enumerate(self._pieces) if self._processor.is_control(index)}

    def has(self, index: int) -> bool:
        return 0 <= index < self.vocab_size


class _TokenizerJson:
    def __init__(self, path: Path) -> None:
        import tokenizers

        self._path = path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises a bare Exception, and Rust's panics are no Exception
            raise ValueError(f"{path}: not a tokenizer.json ({' '.join(str(error).split())})") from None
        for kind in ("ByteLevel", "Metaspace"):
            if repr(self._tokenizer.pre_tokenizer).count(f"{kind}(") > 1:  # some texts would take for ever
                raise ValueError(f"{path}: its pre_tokenizer has {kind} twice; the tokenizers library cannot do that")
        self._tokenizer.encode_special_tokens = True  # a special token spelled out in a text is ordinary text
        self._tokenizer.no_truncation()  # what a file says of these is for batches of training
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = 1 + max(vocabulary.values(), default=-1)
        self.byte_fallback: Mapping[int, int] = {}
        if self._falls_back_to_bytes():
            found = ((index, re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)) for token, index in vocabulary.items())
            self.byte_fallback = {index: int(match[1], 16) for index, match in found if match}

    def _falls_back_to_bytes(self) -> bool:
        decoder = self._tokenizer.decoder
        return decoder is not None and "é" in decoder.decode(["<0xC3>", "<0xA9>"])

    def encode(self, text: str) -> list[int]:
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # a bare one: the file promises tokens that its vocabulary lacks
            raise ValueError(f"{self._path}: cannot encode a text ({error})") from None

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def token_id(self, token: str) -> int | None:
        index: int | None = self._tokenizer.token_to_id(token)
        return index

    def control_tokens(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    def has(self, index: int) -> bool:  # added tokens may leave gaps before them
        return 0 <= index < self.vocab_size and self._tokenizer.id_to_token(index) is not None


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back, with the framing tokens by name.

    `boq`, `eoq`, `eoa` are token ids; `condition_ids` maps each condition the tokenizer has to its id.
    """

    backend: _Backend
    source: Path
    boq: int
    eoq: int
    eoa: int
    condition_ids: dict[str, int]

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read `tokenizer.model` or `tokenizer.json` from a folder.

        Raises FileNotFoundError when there is neither, ValueError when the file is broken, NoFramingError when it lacks
        the framing tokens.
        """
        for name, kind in (("tokenizer.model", _SentencePiece), ("tokenizer.json", _TokenizerJson)):
            if (path := Path(folder) / name).is_file():
                return cls._from_backend(kind(path), path)
        raise FileNotFoundError(f"{folder}: no tokenizer.model and no tokenizer.json")

    @classmethod
    def _from_backend(cls, backend: _Backend, path: Path) -> Tokenizer:
        names = OWN_NAMES if backend.token_id(OWN_NAMES["boq"]) is not None else RELEASED_NAMES
        ids = {role: backend.token_id(token) for role, token in names.items()}
        framing = {}
        for role in ("boq", "eoq", "eoa"):
            if (index := ids.get(role)) is None:
                raise NoFramingError(f"{path}: the token {names[role]!r} ({role}) is missing")
            framing[role] = index
        conditions = {name: index for name in CONDITIONS if (index := ids.get(name)) is not None}
        return cls(backend, path, framing["boq"], framing["eoq"], framing["eoa"], conditions)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.backend.vocab_size

    @property
    def special_ids(self) -> frozenset[int]:
        """The framing tokens: they never appear in decoded text."""
        return frozenset({self.boq, self.eoq, self.eoa, *self.condition_ids.values()})

    def control_tokens(self) -> dict[str, int]:
        """The id of each token that is no text, by the name that a chat template writes it with."""
        spelled = {token: self.backend.token_id(token) for token in (*OWN_NAMES.values(), *RELEASED_NAMES.values())}
        framing = {token: index for token, index in spelled.items() if index in self.special_ids}
        return {**self.backend.control_tokens(), **framing}

    def encode(self, text: str) -> list[int]:
        """Plain text to ids; a framing token that is spelled out in the text stays ordinary text.

        `decode` gives the text back, except that sentencepiece reads U+2581 as a space, and that a tokenizer.json may
        normalise text. Raises ValueError on a lone surrogate, which is no text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text has a lone surrogate at character {error.start}") from None
        return self._encode_plain(text)

    def _encode_plain(self, text: str) -> list[int]:
        ids = self.backend.encode(text)
        if self.special_ids.isdisjoint(ids):
            return ids
        if len(text) == 1:
            raise ValueError(f"{self.source}: the framing token {text!r} is a single character, so it cannot be text")
        # A tokenizer.json that does not mark its framing tokens as special: cut until none is whole.
        middle = len(text) // 2
        return self._encode_plain(text[:middle]) + self._encode_plain(text[middle:])

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, framing tokens left out; an incomplete UTF-8 sequence becomes U+FFFD.

        Raises ValueError on an id outside the vocabulary.
        """
        special = self.special_ids
        plain = [i for i in ids if i not in special]
        for i in plain:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token ids must be in [0, {self.vocab_size}), got {i}")
        return self.backend.decode(plain)

    def decode_answer(self, ids: Iterable[int]) -> str:
        """`decode` without ids beyond the vocabulary: a model's head may have more rows than there are tokens."""
        return self.decode(i for i in ids if i < self.vocab_size)

    def token_text(self, token: int) -> str:
        """What one id adds to a text: nothing for a framing token or an id beyond the vocabulary, U+FFFD for a part of
        a character."""
        before = self.encode("a")  # a decoder may drop the space at the beginning of a text
        return self.decode_answer([*before, token])[len(self.decode_answer(before)) :]

    def conditions(self, condition: str) -> list[int]:
        """The ids of one or several comma-separated conditions. Raises ValueError on one that is unknown."""
        names = [name.strip() for name in condition.split(",")]
        for name in names:
            if name not in self.condition_ids:
                known = ", ".join(self.condition_ids) or "none"
                raise ValueError(f"unknown condition {name!r}; this tokenizer has: {known}")
        return [self.condition_ids[name] for name in names]

    def prompt(self, instruction: str, condition: str = "direct") -> list[int]:
        """The bidirectional prefix of an instruction: `<boq> condition… instruction <eoq>`.

        Raises ValueError on an empty instruction or an unknown condition.
        """
        if not instruction.strip():
            raise ValueError("the prompt is empty")
        return [self.boq, *self.conditions(condition), *self.encode(instruction), self.eoq]


class PieceDecoder:
    """Turns a stream of token ids into text pieces that are always whole UTF-8 characters.

    The pieces together are what `Tokenizer.decode_answer` makes of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._framing = tokenizer.special_ids
        self._pending: list[int] = []
        self._most_pending = 32
        self._shown = ""
        self._run = _ByteRun(tokenizer.backend.byte_fallback)

    def push(self, token: int) -> str:
        """The text that is certain after this token: none for part of a character, or an id beyond the vocabulary.

        Nor is there any while a byte that is still to come may make U+FFFD of characters that are whole already, as it
        does in a tokenizer.json with byte fallback; they come with the next token that is not a byte.
        """
        if token in self._framing or not self._tokenizer.backend.has(token):
            return ""
        self._pending.append(token)
        self._run.push(token)
        if self._run.open:
            return ""
        text = self._tokenizer.decode(self._pending)
        certain = text
        if not self._run.broken:
            # The bytes of an incomplete character, at most three, read as U+FFFD until the rest of it comes.
            for _ in range(3):
                certain = certain.removesuffix("\ufffd")
        piece = self._advance(certain)
        if certain == text and len(self._pending) > self._most_pending:
            self._forget()
        return piece

    def finish(self) -> str:
        """What is left at the end, an incomplete character as U+FFFD."""
        return self._advance(self._tokenizer.decode(self._pending))

    def _advance(self, text: str) -> str:
        piece = text[len(self._shown) :]
        if piece:  # else text may be shorter: two bytes read as two U+FFFD before a third made them one
            self._shown = text
        return piece

    def _forget(self) -> None:
        """Drop the oldest tokens: decoding all of them again each time would take quadratic time.

        A few stay. They settle whether the next token's leading space is shown, so they must have text of their own,
        and whether the run of bytes at the end is broken.
        """
        kept = self._pending[-8:]
        text = self._tokenizer.decode(kept)
        run = _ByteRun(self._tokenizer.backend.byte_fallback)
        for token in kept:
            run.push(token)
        if text and run.broken == self._run.broken:
            self._pending, self._shown, self._most_pending = kept, text, 32
        else:
            self._most_pending = 2 * len(self._pending)


class _ByteRun:
    """The run of byte fallback tokens at the end of a stream: `open` while more bytes may spoil it, `broken` once it is
    no UTF-8 whatever follows."""

    def __init__(self, byte_of: Mapping[int, int]) -> None:
        self._byte_of = byte_of
        self._start()

    def _start(self) -> None:
        self.open = self.broken = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")()

    def push(self, token: int) -> None:
        if (byte := self._byte_of.get(token)) is None:
            if self.open or self.broken:
                self._start()
        elif not self.broken:
            try:
                self._utf8.decode(bytes([byte]))
                self.open = True
            except UnicodeDecodeError:
                self.open, self.broken = False, True


def train_tokenizer(
    texts: Iterable[str], folder: str | Path, vocab_size: int, phrases: Sequence[str] = ()
) -> Tokenizer:
    """Train a sentencepiece BPE (byte fallback, digits split) and write `tokenizer.model` into a folder.

    `phrases` are texts that always become a single token each: the unchanging wording of a task.
    Raises ValueError when there is no text, or the vocabulary does not hold every character or cannot be filled.
    """
    if vocab_size < 1:
        raise ValueError(f"tokenizer: the vocabulary must have at least 1 token, got {vocab_size}")
    import sentencepiece

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    failed: list[Exception] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_watched(texts, failed),
            model_writer=model,  # not a file name, which the model would remember
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            character_coverage=1.0,
            required_chars="\u2581",  # a space, even where the texts have none: as bytes it would decode as U+2581
            control_symbols=list(OWN_NAMES.values()),
            user_defined_symbols=["\n", *(phrase.replace(" ", "\u2581") for phrase in phrases)],
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            max_sentence_length=1 << 20,
            minloglevel=2,
        )
    except RuntimeError as error:
        if not failed:
            raise _refusal(vocab_size, str(error)) from None
    if failed:
        raise failed[0]
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return Tokenizer.load(folder)


def _watched(texts: Iterable[str], failed: list[Exception]) -> Iterator[str]:
    """The texts; what goes wrong in reading them ends them and is kept, for sentencepiece would drop it."""
    try:
        yield from texts
    except Exception as error:
        failed.append(error)


class VocabularyError(ValueError):
    """A tokenizer of this size cannot be trained on these texts; `fits` is the nearest size that can, if known."""

    def __init__(self, message: str, fits: int | None) -> None:
        super().__init__(message)
        self.fits = fits


def _refusal(size: int, error: str) -> VocabularyError:
    """What sentencepiece's error means here: it names options of its own command."""
    if high := re.search(r"set it to a value <= (\d+)", error):
        most = int(high[1])
        message = f"tokenizer: a vocabulary of {size} is too large: the texts give at most {most} tokens"
        return VocabularyError(message, most)
    if low := re.search(r"required_chars\. \d+ vs (\d+)", error):
        least = int(low[1])
        what = "the bytes, the framing tokens and the characters of the texts alone take"
        return VocabularyError(f"tokenizer: a vocabulary of {size} is too small: {what} {least}", least)
    if "sentences_.empty()" in error or "all_chars_count" in error:
        return VocabularyError("tokenizer: there is no text to train it on", None)
    return VocabularyError(f"tokenizer: {' '.join(error.split())}", None)
