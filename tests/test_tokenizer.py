"""Tokenizers: round trips, framing, streaming, broken files; sentencepiece and tokenizers are the oracles of ids."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from hrmcore.tokenizer import (
    CONDITIONS,
    OWN_NAMES,
    RELEASED_NAMES,
    PieceDecoder,
    Tokenizer,
    VocabularyError,
    train_tokenizer,
)

TEXTS = [
    "How many times does the letter r appear? Count the bits of 1023.\n",
    "spell backward: hello world, größer, naïve\ttab\n",
    "12 + 45 = 57 and gcd(36, 24) = 12\n",
] * 20
PHRASES = ("How many times does the letter", "spell backward: ", "\n1 2 3 4\n")
LISTED = ["", " ", "  two  spaces ", "\r\n", "a\0b", "\ufffd", "<0x41><unk><pad>", "\U0010ffff"]
LISTED += ["😀👩\u200d👩\u200d👧🇺🇳", "ﬁ①\u00a0\u3000\u200b"]
# Any text but lone surrogates; U+2581 is how sentencepiece spells a space.
ANY_TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\u2581"))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("own"), 384, PHRASES)


def byte_level_bpe(special: bool) -> tokenizers.Tokenizer:
    """A tokenizer as the released models have it, framing tokens marked special or not."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([*TEXTS, *["<|im_end|>"] * 9], trainer)
    names = list(RELEASED_NAMES.values())
    made.add_special_tokens(names) if special else made.add_tokens(names)
    return made


def saved(made: tokenizers.Tokenizer, folder: Path) -> Tokenizer:
    made.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return saved(byte_level_bpe(special=True), tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer.json as Llama's: words with U+2581, bytes for the rest, and a gap in the ids."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"helowrd日e\u0301"]
    tokens += ["\u2581hello", "lo", "\ufffd", *RELEASED_NAMES.values()]
    vocab = {token: index + 5 * (index >= 259) for index, token in enumerate(dict.fromkeys(tokens))}
    model = models.BPE(vocab=vocab, merges=[("l", "o")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<s>", "</s>", *RELEASED_NAMES.values()])
    folder = tmp_path_factory.mktemp("byte_fallback")
    assert made.id_to_token(260) is None
    return saved(made, folder)


@pytest.fixture(params=["own", "released", "byte_fallback"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Every kind of decoder: sentencepiece's, byte-level, byte fallback."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["own", "released"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", [*TEXTS[:3], *LISTED])
def test_listed_texts_come_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=200)
@given(text=ANY_TEXT)
def test_any_text_comes_back(own: Tokenizer, released: Tokenizer, text: str) -> None:
    assert own.decode(own.encode(text)) == text
    assert released.decode(released.encode(text)) == text


def test_sentencepiece_writes_its_own_space_as_a_space(own: Tokenizer) -> None:
    assert own.decode(own.encode("a\u2581b")) == "a b"


def test_a_phrase_is_one_token(own: Tokenizer) -> None:
    for phrase in PHRASES:
        assert len(own.encode(phrase)) == 1
    assert len(own.encode(f"{PHRASES[0]} {PHRASES[1]}")) == 3


def test_digits_are_single_tokens(own: Tokenizer) -> None:
    assert len(own.encode("1023")) == 4


def test_the_vocabulary_has_the_size_asked_for(own: Tokenizer) -> None:
    assert own.vocab_size == 384
    assert all(0 <= token < 384 for token in own.special_ids)
    assert len(own.special_ids) == len(OWN_NAMES)


def test_training_again_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        train_tokenizer(TEXTS, tmp_path / name, 384, PHRASES)
    assert (tmp_path / "a/tokenizer.model").read_bytes() == (tmp_path / "b/tokenizer.model").read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["tokenizer.model"]
    assert str(tmp_path).encode() not in (tmp_path / "a/tokenizer.model").read_bytes()


@pytest.mark.parametrize(("size", "advice"), [(5000, "too large: .* at most"), (20, "too small: .* take")])
@pytest.mark.parametrize("texts", [["abc"], ["héllo wörld, hello world"] * 9, ["日本語"]])
def test_a_vocabulary_that_does_not_fit_names_the_size_that_does(
    size: int, advice: str, texts: list[str], tmp_path: Path
) -> None:
    with pytest.raises(VocabularyError, match=f"^tokenizer: a vocabulary of {size} is {advice} ") as refused:
        train_tokenizer(texts, tmp_path, size)
    assert refused.value.fits is not None
    assert train_tokenizer(texts, tmp_path, refused.value.fits).vocab_size == refused.value.fits


def test_texts_that_cannot_be_read_stop_the_training_of_a_tokenizer(tmp_path: Path) -> None:
    def broken() -> Iterator[str]:
        yield "hello world " * 99
        raise ValueError("a.csv:7: broken")

    with pytest.raises(ValueError, match=r"a\.csv:7: broken"):
        train_tokenizer(broken(), tmp_path, 270)


TRAINING_FAULTS = [
    (["abc"], 5000, r"tokenizer: a vocabulary of 5000 is too large: the texts give at most \d+ tokens$"),
    (["abc"], 10, r"a vocabulary of 10 is too small: the bytes, the framing tokens and the characters .* take \d+$"),
    (["abc"], 0, "tokenizer: the vocabulary must have at least 1 token, got 0"),
    (["abc"], -4, "tokenizer: the vocabulary must have at least 1 token, got -4"),
    ([], 300, "tokenizer: there is no text to train it on"),
    (["\0"], 300, "tokenizer: there is no text to train it on"),
]


@pytest.mark.parametrize(("texts", "size", "message"), TRAINING_FAULTS)
def test_what_no_tokenizer_can_be_trained_on(texts: list[str], size: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        train_tokenizer(texts, tmp_path, size)
    assert "--" not in str(error.value)


def test_the_smallest_vocabulary_is_the_one_that_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too small") as error:
        train_tokenizer(TEXTS, tmp_path, 10)
    least = int(str(error.value).split()[-1])
    assert train_tokenizer(TEXTS, tmp_path, least).vocab_size == least
    with pytest.raises(ValueError, match=f"take {least}"):
        train_tokenizer(TEXTS, tmp_path, least - 1)


def test_released_ids_are_those_of_the_library(tmp_path: Path) -> None:
    library = byte_level_bpe(special=True)
    ours = saved(library, tmp_path)
    assert ours.vocab_size == library.get_vocab_size()
    for text in TEXTS[:3]:
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert ours.boq == library.token_to_id("<|im_start|>")
    assert ours.eoq == library.token_to_id("<|im_end|>")
    assert ours.eoa == library.token_to_id("<|box_end|>")
    assert ours.condition_ids == {name: library.token_to_id(RELEASED_NAMES[name]) for name in CONDITIONS}


def test_a_prompt_is_framed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.prompt("12 + 45", "cot, synth")
    conditions = [tokenizer.condition_ids["cot"], tokenizer.condition_ids["synth"]]
    assert ids == [tokenizer.boq, *conditions, *tokenizer.encode("12 + 45"), tokenizer.eoq]
    assert tokenizer.decode(ids) == "12 + 45"
    assert tokenizer.prompt("12 + 45")[1] == tokenizer.condition_ids["direct"]


@pytest.mark.parametrize("condition", ["fast", "", "direct,", "Direct"])
def test_an_unknown_condition_is_named(tokenizer: Tokenizer, condition: str) -> None:
    with pytest.raises(ValueError, match=r"unknown condition '(fast||Direct)'; this tokenizer has: direct, cot"):
        tokenizer.prompt("12 + 45", condition)


@pytest.mark.parametrize("instruction", ["", " ", "\n\t"])
def test_an_empty_prompt_is_refused(tokenizer: Tokenizer, instruction: str) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        tokenizer.prompt(instruction)


def test_a_lone_surrogate_is_no_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud800")


@pytest.mark.parametrize("token", [-1, 384 + 7, 1 << 70])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(ValueError, match=rf"token ids must be in \[0, \d+\), got {token}"):
        tokenizer.decode([5, token])


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("token", ["<|im_end|>", "<|box_end|>", "<|im_start|>"])
def test_a_released_framing_token_cannot_be_injected(tmp_path: Path, token: str, special: bool) -> None:
    library = byte_level_bpe(special)
    assert library.token_to_id(token) in library.encode(f"a{token}b", add_special_tokens=False).ids
    ours = saved(library, tmp_path)
    for text in (token, f"12 {token} + 45", token * 3, f"{token}\n{token[:-1]}"):
        ids = ours.encode(text)
        assert ours.special_ids.isdisjoint(ids)
        assert ours.decode(ids) == text


def test_a_spelled_out_special_token_is_cut_as_the_library_cuts_text(tmp_path: Path) -> None:
    library = byte_level_bpe(special=True)
    ours = saved(library, tmp_path)
    library.encode_special_tokens = True
    assert ours.encode("12 <|im_end|> + 45") == library.encode("12 <|im_end|> + 45", add_special_tokens=False).ids


@pytest.mark.parametrize("token", OWN_NAMES.values())
def test_our_framing_tokens_cannot_be_injected(own: Tokenizer, token: str) -> None:
    ids = own.encode(f"12 {token} + 45")
    assert own.special_ids.isdisjoint(ids)
    assert own.decode(ids) == f"12 {token} + 45"


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = PieceDecoder(tokenizer)
    return [*(decoder.push(token) for token in ids), decoder.finish()]


@settings(deadline=None, max_examples=100)
@given(text=ANY_TEXT.map(lambda text: text * 5))
@example(text="\ufffd" * 5)  # itself what an incomplete character reads as
def test_streamed_pieces_of_text_are_whole(own: Tokenizer, released: Tokenizer, text: str) -> None:
    for tokenizer in (own, released):
        pieces = streamed(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == text
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_streamed_pieces_of_any_ids_make_up_what_decode_gives(any_tokenizer: Tokenizer) -> None:
    """Ids as a model may sample them: bytes that rarely make up characters, control tokens, framing tokens, gaps."""
    tokenizer = any_tokenizer
    choose = random.Random(0)
    first = tokenizer.encode("\U0010ffff")[-4:]  # 4 bytes: among the byte tokens of all kinds
    characters = [tokenizer.encode(text)[-6:] for text in ("é", "日", "語", "😀", "e\u0301", " a", " ", "\ufffd")]
    special = [[0], [1], [2], *([token] for token in tokenizer.special_ids)]
    for _ in range(1500):
        ids: list[int] = []
        for _ in range(choose.randrange(80)):
            kind = choose.choice(
                [[[choose.randrange(tokenizer.vocab_size)]], [[i] for i in first], characters, special]
            )
            ids += choose.choice(kind)
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        for piece in pieces:
            assert piece.encode().decode() == piece


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\u2581\ufffd"), max_size=60))
@example(text="😀🎉")
@example(text="日本語")
@example(text="hello é日本 " * 20)
@example(text="日本語😀" * 30)
def test_byte_fallback_streams_whole_characters(byte_fallback: Tokenizer, text: str) -> None:
    ids = byte_fallback.encode(text)
    pieces = streamed(byte_fallback, ids)
    assert "".join(pieces) == byte_fallback.decode(ids) == text
    library = tokenizers.Tokenizer.from_file(str(byte_fallback.source))
    assert "".join(pieces) == library.decode(ids, skip_special_tokens=False)


def test_a_run_of_bytes_is_shown_when_nothing_can_change_it(byte_fallback: Tokenizer) -> None:
    """The library makes U+FFFD of a whole run for one byte that does not fit, of characters before it, too."""
    a, run, broken = byte_fallback.encode("h")[-1], byte_fallback.encode("語")[-3:], byte_fallback.encode("é")[-1]
    assert streamed(byte_fallback, [a, *run, *run, a]) == ["h", "", "", "", "", "", "", "語語h", ""]
    assert streamed(byte_fallback, [*run, *run[:2]])[-1] == "\ufffd" * 5
    assert streamed(byte_fallback, [*run, broken, *run, a])[-6:] == ["\ufffd" * 4, *"\ufffd\ufffd\ufffdh", ""]


def test_a_character_is_shown_with_its_last_byte_and_not_before(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\U0010ffffb")
    assert streamed(tokenizer, ids) == ["a", "", "", "", "\U0010ffff", "b", ""]
    assert streamed(tokenizer, ids[:3])[-1].strip("\ufffd") == ""
    assert streamed(tokenizer, ids[:3])[-1] != ""


def test_a_row_that_no_word_belongs_to_is_no_text(any_tokenizer: Tokenizer) -> None:
    tokenizer = any_tokenizer
    ids, beyond = tokenizer.encode("größer"), tokenizer.vocab_size
    answered = [i for token in ids for i in (token, beyond, beyond + 99)]
    decoder = PieceDecoder(tokenizer)
    assert "".join([*map(decoder.push, answered), decoder.finish()]) == "größer"
    assert tokenizer.decode_answer(answered) == "größer"


def test_endless_broken_bytes_are_shown_as_they_come(any_tokenizer: Tokenizer) -> None:
    last = any_tokenizer.encode("\U0010ffff")[-1]
    decoder = PieceDecoder(any_tokenizer)
    assert sum(len(decoder.push(last)) for _ in range(100)) >= 97


def test_streamed_words_keep_their_spaces_where_a_tokenizer_strips_the_first(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    made.add_special_tokens(list(RELEASED_NAMES.values()))
    tokenizer = saved(made, tmp_path)
    text = "hello world " * 40 + "hello"
    assert "".join(streamed(tokenizer, tokenizer.encode(text))) == tokenizer.decode(tokenizer.encode(text)) == text


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.model and no tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_without_framing_tokens(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(models.BPE())
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: the token '<\|im_start\|>' \(boq\) is missing"):
        Tokenizer.load(tmp_path)


LOAD_EACH = """
import sys
from hrmcore.tokenizer import Tokenizer
for folder in sys.argv[1:]:
    try:
        Tokenizer.load(folder).encode("12 + 45")
        print("loaded")
    except ValueError as error:
        print("ValueError", error)
"""


def test_broken_files_are_errors_and_not_crashes(own: Tokenizer, released: Tokenizer, tmp_path: Path) -> None:
    """In a child process, because these libraries are C++ and Rust."""
    contents: list[tuple[str, bytes]] = []
    for source in (own.source, released.source):
        whole = source.read_bytes()
        flipped = bytes(byte ^ 0xFF if index % 997 == 5 else byte for index, byte in enumerate(whole))
        pieces = (b"", b"\0" * 64, whole[:1], whole[: len(whole) // 2], whole[: len(whole) - 1], flipped)
        contents += [(source.name, piece) for piece in pieces]
    empty = json.loads(released.source.read_text()) | {"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}
    contents += [("tokenizer.json", text.encode()) for text in ("[]", "{}", "null", "[" * 100_000, json.dumps(empty))]
    folders = []
    for index, (name, content) in enumerate(contents):
        folders.append(tmp_path / str(index))
        folders[-1].mkdir()
        (folders[-1] / name).write_bytes(content)
    child = subprocess.run([sys.executable, "-c", LOAD_EACH, *folders], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    lines = child.stdout.splitlines()
    assert len(lines) == len(folders)
    for line, folder in zip(lines, folders, strict=True):
        assert line.startswith(f"ValueError {folder}"), line


CHANGE_EACH_BYTE = """
import sys
from collections.abc import Iterator
from pathlib import Path
from hrmcore.tokenizer import Tokenizer
path = Path(sys.argv[1])
whole = path.read_bytes()
for position in range(0, len(whole), 11):
    path.write_bytes(whole[:position] + b"\\xdd" + whole[position + 1 :])
    try:
        Tokenizer.load(path.parent).encode("12 + 45")
        print("loaded")
    except ValueError as error:
        print("ValueError", str(error).splitlines()[0])
"""


def test_a_changed_byte_is_no_crash_and_an_error_names_the_file(own: Tokenizer, tmp_path: Path) -> None:
    """Bytes that are no UTF-8 fail within the library, while it words its own error."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(own.source.read_bytes())
    command = [sys.executable, "-c", CHANGE_EACH_BYTE, str(path)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    lines = set(child.stdout.splitlines())
    assert any("codec can't decode" in line for line in lines)
    assert all(line == "loaded" or line.startswith(f"ValueError {path}: ") for line in lines), lines


def test_a_piece_that_is_no_utf8_is_refused(own: Tokenizer, tmp_path: Path) -> None:
    """The library opens such a file, and fails when it is asked for that piece."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(own.source.read_bytes().replace(b"<boq>", b"<bo\xff>"))
    with pytest.raises(ValueError, match=r"tokenizer\.model: not a sentencepiece model \(a piece is not UTF-8\)$"):
        Tokenizer.load(tmp_path)
