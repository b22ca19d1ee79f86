"""Generation: cached against full, batches against solo, text against tokens, and every wrong argument."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import edit_config
from support.engines import distance
from transformers import AutoModelForCausalLM

import hrmcore.engine.engine
from hrmcore import _C
from hrmcore.config import HRMConfig
from hrmcore.engine.cpu_runner import CpuRunner, convert
from hrmcore.engine.engine import Engine, load
from hrmcore.engine.runner import PAGE, Prefill
from hrmcore.engine.streams import StopFilter
from hrmcore.engine.torch_runner import TorchRunner
from hrmcore.model import HRM

pytestmark = pytest.mark.usefixtures("one_thread")


def model(seed: int = 0, **changes: Any) -> HRM:
    values: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_layers_per_stack": 2,
        "num_attention_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 256,
    }
    torch.manual_seed(seed)
    return HRM(HRMConfig(**{**values, **changes}))


def untexted(**changes: Any) -> Engine:
    return Engine(TorchRunner(model(**changes)), None, Path("nowhere"))


def random_ids(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 61, length).tolist()


# --- the cache ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("H_cycles", "L_cycles"), [(1, 1), (1, 3), (2, 3), (3, 2)])
@pytest.mark.parametrize("prefix", [0, 1, 5, 9])
def test_cached_decode_is_the_full_forward_token_by_token(H_cycles: int, L_cycles: int, prefix: int) -> None:
    hrm = model(H_cycles=H_cycles, L_cycles=L_cycles)
    ids = random_ids(25)
    full = hrm(torch.tensor([ids]), prefix)[0].detach()
    runner = TorchRunner(hrm)
    (handle,), first = runner.open([ids[:9]], [prefix])
    assert distance(first[0], full[8]) <= 1e-5
    for position in range(9, 25):
        row = runner.step([handle], [ids[position]])[0]
        assert distance(row, full[position]) <= 1e-5


@pytest.mark.parametrize("length", [PAGE - 2, PAGE, 2 * PAGE + 1])
def test_cached_decode_crosses_pages(length: int) -> None:
    hrm, ids = model(max_position_embeddings=512), random_ids(length + 2 * PAGE)
    full = hrm(torch.tensor([ids]), length)[0].detach()
    runner = TorchRunner(hrm)
    (handle,), _ = runner.open([ids[:length]], [length])
    for position in range(length, len(ids)):
        row = runner.step([handle], [ids[position]])[0]
        assert distance(row, full[position]) <= 1e-5


def test_sequences_that_join_and_leave_change_no_other() -> None:
    hrm = model()
    texts = [random_ids(length, seed) for seed, length in enumerate((90, 3, 70, 130))]
    prompts, prefixes = [40, 1, 66, 5], [40, 0, 12, 5]
    full = [hrm(torch.tensor([ids]), prefix)[0].detach() for ids, prefix in zip(texts, prefixes, strict=True)]
    runner = TorchRunner(hrm)
    handles: dict[int, int] = {}
    at: dict[int, int] = {}

    def join(*members: int) -> None:
        opened, rows = runner.open([texts[m][: prompts[m]] for m in members], [prefixes[m] for m in members])
        for m, handle, row in zip(members, opened, rows, strict=True):
            handles[m], at[m] = handle, prompts[m]
            assert distance(row, full[m][prompts[m] - 1]) <= 1e-5

    def step(*members: int) -> None:
        rows = runner.step([handles[m] for m in members], [texts[m][at[m]] for m in members])
        for m, row in zip(members, rows, strict=True):
            assert distance(row, full[m][at[m]]) <= 1e-5
            at[m] += 1

    join(0, 1)
    step(0, 1)
    join(2)
    step(2, 0, 1)  # in any order
    runner.close(handles[1])
    join(3)  # takes the pages that 1 left
    while at[0] < 90 and at[2] < 70:
        step(0, 2, 3)
    runner.close(handles[2])
    while at[0] < 90:
        step(3, 0)


def test_a_causal_model_ignores_the_prefix() -> None:
    hrm, ids = model(prefix_lm=False), random_ids(12)
    expected = hrm(torch.tensor([ids]), 0)[0].detach()
    runner = TorchRunner(hrm)
    assert distance(Engine(runner, None, Path("nowhere")).logits(ids), expected) <= 1e-6
    (handle,), first = runner.open([ids[:8]], [8])
    assert distance(first[0], expected[7]) <= 1e-5
    assert distance(runner.step([handle], [ids[8]])[0], expected[8]) <= 1e-5


def test_an_interrupted_step_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hrm, ids = model(), random_ids(12)
    expected = hrm(torch.tensor([ids]), 10)[0].detach()
    runner = TorchRunner(hrm)
    (handle,), _ = runner.open([ids[:10]], [10])
    with monkeypatch.context() as patch:
        patch.setattr(hrm.H_module, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            runner.step([handle], [1])
        with pytest.raises(KeyboardInterrupt):
            runner.open([ids], [3])
    assert runner.open_sequences == 1
    for position in (10, 11):
        assert distance(runner.step([handle], [ids[position]])[0], expected[position]) <= 1e-5


# --- token ids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 3, None])
def test_greedy_tokens_are_the_argmax_of_the_full_forward(prefix: int | None) -> None:
    hrm, ids = model(), random_ids(6)
    expected = list(ids)
    for _ in range(12):
        expected.append(int(hrm(torch.tensor([expected]), 6 if prefix is None else prefix)[0, -1].argmax()))
    engine = Engine(TorchRunner(hrm), None, Path("nowhere"))
    assert list(engine.tokens(ids, prefix_length=prefix, max_new_tokens=12)) == expected[6:]


def test_ids_may_be_a_list_a_tensor_or_an_array() -> None:
    engine, ids = untexted(), random_ids(6)
    answers = [list(engine.tokens(form)) for form in (ids, tuple(ids), torch.tensor(ids), np.array(ids, np.int32))]
    assert len(answers[0]) == 64
    assert all(answer == answers[0] for answer in answers)


def test_the_end_token_ends_unless_it_is_ignored() -> None:
    ids = random_ids(6)
    free = list(untexted().tokens(ids, max_new_tokens=20))
    last = free.index(free[7])
    ending = untexted(eos_token_id=(60, free[7]))
    assert list(ending.tokens(ids, max_new_tokens=20)) == free[:last]
    assert list(ending.tokens(ids, max_new_tokens=20, ignore_eos=True)) == free


def test_tokens_end_with_the_context() -> None:
    engine = untexted(max_position_embeddings=32)
    assert len(list(engine.tokens(random_ids(20), max_new_tokens=100))) == 12
    assert len(list(engine.tokens(random_ids(31), max_new_tokens=100))) == 1


def test_logits_are_the_model_s() -> None:
    hrm, ids = model(), random_ids(9)
    logits = Engine(TorchRunner(hrm), None, Path("nowhere")).logits(ids, prefix_length=4)
    assert logits.dtype == torch.float32
    assert logits.shape == (9, 61)
    assert torch.equal(logits, hrm(torch.tensor([ids]), 4)[0])


def test_closing_releases_the_sequence() -> None:
    engine = untexted()
    running = engine.tokens(random_ids(5))
    next(running)
    assert engine.open_requests == 1
    running.close()
    assert engine.open_requests == 0
    assert list(running) == []
    abandoned = engine.tokens(random_ids(5))
    next(abandoned)
    del abandoned
    gc.collect()
    assert engine.open_requests == 0


# --- text --------------------------------------------------------------------------------------------------------

PROMPTS = ["what is 3 plus 4?", "copy\n1 2\n3 4", "é", "what is 30 plus 17? " * 6, "ü, copy", "what is 3 plus 4?"]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5}, {"repetition_penalty": 1.5, "stop": ["a"]}])
def test_a_batch_answers_as_each_prompt_alone(engine: Engine, options: dict[str, Any]) -> None:
    alone = [engine.generate(prompt, max_new_tokens=24, **options) for prompt in PROMPTS]
    assert engine.generate(PROMPTS, max_new_tokens=24, **options) == alone
    assert engine.generate(list(reversed(PROMPTS)), max_new_tokens=24, **options) == alone[::-1]
    assert len(set(alone)) == len(PROMPTS) - 1
    assert engine.generate([]) == []
    assert engine.open_requests == 0


class Watched:
    """A runner that notes how many sequences it held, and how many tokens it was given at once."""

    def __init__(self, runner: Any) -> None:
        self._watched = runner
        self.held = 0
        self.prefill = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watched, name)

    def begin(self, prompts: Sequence[Sequence[int]], *rest: Any) -> Prefill:
        begun = self._watched.begin(prompts, *rest)
        self.held = max(self.held, self._watched.open_sequences)
        self.prefill = max(self.prefill, sum(map(len, prompts)))
        return begun

    def fork(self, kept: int) -> int:
        handle = self._watched.fork(kept)
        self.held = max(self.held, self._watched.open_sequences)
        return handle


@pytest.mark.parametrize(
    ("limit", "value", "most_held"),
    [("MAX_BATCH", 2, 2), ("CACHE_BUDGET", 1, 1), ("CACHE_BUDGET", 100 * 3072, 3), ("PREFILL_TOKENS", 1, 6)],
)
def test_long_queues_wait_for_room(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, most_held: int
) -> None:
    stops = {"stop": ["a"]}  # answers of unequal length
    alone = [engine.generate(prompt, max_new_tokens=20, **stops) for prompt in PROMPTS]
    assert len({len(answer) for answer in alone}) > 2
    watched = Watched(CpuRunner.from_checkpoint(engine.source, "auto", None, 1, 0))
    assert watched.cache_bytes_per_token == 3072
    monkeypatch.setattr(hrmcore.engine.engine, limit, value)
    queued = Engine(watched, engine.tokenizer, engine.source)
    assert queued.generate(PROMPTS, max_new_tokens=20, **stops) == alone
    assert 1 <= watched.held <= most_held
    longest = max(len(queued.tokenizer.prompt(prompt)) for prompt in PROMPTS)
    assert limit != "PREFILL_TOKENS" or watched.prefill == longest


def test_pieces_are_whole_characters_and_make_up_the_decoded_tokens(engine: Engine) -> None:
    ids = engine.tokenizer.prompt("é")
    for seed in range(5):
        sampled = {"temperature": 2.0, "seed": seed, "max_new_tokens": 80}
        answer = engine.stream("é", **sampled)
        pieces = list(answer)
        assert len(pieces) > 10
        for piece in pieces:
            piece.encode("utf-8")
        tokens = list(engine.tokens(ids, **sampled))
        assert "".join(pieces) == engine.tokenizer.decode(tokens) == engine.generate("é", **sampled)
        assert answer.token_count == len(tokens)


def test_an_answer_ends_before_a_stop_string(engine: Engine) -> None:
    full = engine.generate("what is 3 plus 4?", max_new_tokens=60)
    for start, size in [(0, 1), (3, 2), (10, 5), (20, 3)]:
        stop = full[start : start + size]
        answer = engine.stream("what is 3 plus 4?", max_new_tokens=60, stop=stop)
        pieces = list(answer)
        assert "".join(pieces) == full[: full.index(stop)]
        assert answer.finish == "stop"
        assert engine.generate(["what is 3 plus 4?"], max_new_tokens=60, stop=[stop, "no such text"]) == [
            full[: full.index(stop)]
        ]
    assert engine.generate("what is 3 plus 4?", max_new_tokens=60, stop=[full + "x"]) == full


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_are_found_however_the_text_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    # By the definition: read on until the text ends with a stop string; the longest one that it ends with goes.
    expected, stopped = text, False
    for end in range(len(text) + 1):
        if any(text[:end].endswith(stop) for stop in stops):
            longest = max(len(stop) for stop in stops if text[:end].endswith(stop))
            expected, stopped = text[: end - longest], True
            break
    filtered, shown, rest = StopFilter(stops), "", text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        shown += filtered.push(rest[:size])
        rest = rest[size:]
        assert expected.startswith(shown)
        if not filtered.stopped:  # nothing is held back that begins no stop string
            held = text[len(shown) : len(text) - len(rest)]
            assert held == "" or any(stop.startswith(held) for stop in stops)
    assert (shown + filtered.rest(), filtered.stopped) == (expected, stopped)


def test_the_reason_for_the_end_is_told(engine: Engine, checkpoint: Path, tmp_path: Path) -> None:
    answer = engine.stream("é", max_new_tokens=3)
    assert answer.finish is None
    list(answer)
    assert (answer.finish, answer.token_count) == ("length", 3)

    third = list(engine.tokens(engine.tokenizer.prompt("é"), max_new_tokens=3))[-1]
    changed(checkpoint, tmp_path / "ends", eos_token_id=third)
    answer = load(tmp_path / "ends").stream("é")
    list(answer)
    assert (answer.finish, answer.token_count) == ("end", 2)

    prompt_length = len(engine.tokenizer.prompt("é"))
    changed(checkpoint, tmp_path / "short", max_position_embeddings=prompt_length + 4)
    answer = load(tmp_path / "short").stream("é")
    list(answer)
    assert (answer.finish, answer.token_count) == ("context", 4)


def changed(checkpoint: Path, folder: Path, **config: Any) -> None:
    """A copy of a checkpoint with another config."""
    shutil.copytree(checkpoint, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))


def test_closing_an_answer_cancels_it(engine: Engine) -> None:
    answer = engine.stream("what is 3 plus 4?", stop="\x00\x00")
    next(answer)
    assert engine.open_requests == 1
    answer.close()
    assert engine.open_requests == 0
    assert list(answer) == []
    assert answer.finish == "closed"
    unused = engine.stream("é")
    unused.close()
    assert (list(unused), unused.finish) == ([], "closed")
    finished = engine.stream("é", max_new_tokens=1)
    list(finished)
    finished.close()
    assert finished.finish == "length"


def test_streams_may_interleave(engine: Engine) -> None:
    alone = [engine.generate(prompt, max_new_tokens=20) for prompt in PROMPTS[:2]]
    first, second = (engine.stream(prompt, max_new_tokens=20) for prompt in PROMPTS[:2])
    texts = ["", ""]
    while len(texts[0]) < len(alone[0]) or len(texts[1]) < len(alone[1]):
        texts[0] += next(first, "")
        texts[1] += next(second, "")
    assert texts == alone


# --- loading -----------------------------------------------------------------------------------------------------


def test_bfloat16_is_close_to_float32_and_not_it(checkpoint: Path, engine: Engine) -> None:
    half = load(checkpoint, dtype="bfloat16")
    ids = engine.tokenizer.prompt(PROMPTS[3])
    assert 1e-3 < distance(half.logits(ids), engine.logits(ids)) < 3e-2
    whole_runner, half_runner = (
        CpuRunner.from_checkpoint(checkpoint, dtype, None, None, 0) for dtype in ("float32", "bfloat16")
    )
    (handle,), first = half_runner.open([ids[:-1]], [5])
    assert distance(half_runner.step([handle], ids[-1:])[0], engine.logits(ids, 5)[-1]) < 3e-2
    assert half_runner.cache_bytes_per_token * 2 == whole_runner.cache_bytes_per_token
    assert first.dtype == np.float32


def test_a_checkpoint_without_a_tokenizer_refuses_only_text(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    engine = load(tmp_path)
    assert len(list(engine.tokens([1, 2], max_new_tokens=4))) == 4
    for refused in (engine.generate, engine.stream, lambda text: engine.generate([text])):
        with pytest.raises(ValueError, match=r"no tokenizer.*Engine\.tokens"):
            refused("text")


def test_a_tokenizer_of_another_kind_of_model_refuses_only_text(tmp_path: Path) -> None:
    """One with a chat template of its own and none of the framing tokens."""
    hrm = model()
    hrm.save_pretrained(tmp_path)
    foreign = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "[INST]": 2, "text": 3}, "<s>"))
    foreign.add_special_tokens(["<s>", "</s>"])
    foreign.save(str(tmp_path / "tokenizer.json"))
    template = {"chat_template": "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(template))
    convert(tmp_path, tmp_path / "packed", "float32")
    for folder in (tmp_path, tmp_path / "packed"):
        engine = load(folder)
        assert engine.tokenizer is None
        assert len(list(engine.tokens([1, 2], max_new_tokens=4))) == 4
        assert distance(engine.logits([1, 2, 3]), hrm(torch.tensor([[1, 2, 3]]), 3)[0].detach()) <= 1e-5
        missing = r"tokenizer\.json: the token '<\|im_start\|>' \(boq\) is missing, so no prompt can be framed: give"
        prompts: list[Any] = ["text", ["text"]]
        for prompt in prompts:
            with pytest.raises(ValueError, match=missing):
                engine.generate(prompt)


def test_a_broken_tokenizer_is_an_error(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load(tmp_path)


def test_a_tokenizer_that_is_larger_than_the_model_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    shutil.copy(checkpoint / "tokenizer.model", tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.model.*300 tokens.*vocab_size is 61"):
        load(tmp_path)


@pytest.mark.parametrize("named", ["config", "generation", "both"])
def test_an_answer_ends_where_transformers_ends_it(named: str, tmp_path: Path) -> None:
    """At the first token that config.json or generation_config.json names; transformers reads the latter, if there."""
    hrm, ids = model(), random_ids(9)
    hrm.save_pretrained(tmp_path)
    free = list(load(tmp_path).tokens(ids, max_new_tokens=24))
    first, second = sorted(set(free), key=free.index)[2:4]
    if named != "generation":
        edit_config(tmp_path, eos_token_id=second)
    if named != "config":
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [first, second, 61, 1 << 40]}))
    end = second if named == "config" else first
    expected = free[: free.index(end)]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt, mask = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)
    answered = theirs.generate(
        input_ids=prompt, attention_mask=mask, token_type_ids=mask, max_new_tokens=24, do_sample=False, pad_token_id=0
    )
    assert answered[0, len(ids) :].tolist() == [*expected, end]
    convert(tmp_path, tmp_path / "packed", "float32")
    for folder in (tmp_path, tmp_path / "packed"):
        answer = load(folder).tokens(ids, max_new_tokens=24)
        assert list(answer) == expected
        assert answer.request.finish == "end"


@pytest.mark.parametrize("value", ["4", [4, None], True, 4.0, {"id": 4}])
def test_a_generation_config_that_names_no_token_is_an_error(value: Any, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be a token id or a list of them"):
        load(tmp_path)


def test_threads_are_set_for_torch_and_the_kernels(checkpoint: Path) -> None:
    load(checkpoint, threads=2)
    assert (torch.get_num_threads(), _C.num_threads()) == (2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype must be auto, float32, bfloat16, int8 or int4, got 'float16'"),
        ({"dtype": torch.float32}, "dtype must be"),
        ({"kv_dtype": "int4"}, "kv_dtype must be float32, bfloat16 or int8, got 'int4'"),
        ({"device": "tpu"}, "device must be 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
        ({"device": "cuda:"}, "device must be 'cpu', 'cuda' or 'cuda:N', got 'cuda:'"),
        ({"device": "cuda", "kv_dtype": "float32"}, "kv_dtype must be bfloat16 or int8 on cuda, got 'float32'"),
        ({"device": None}, "device must be"),
        ({"threads": 0}, "threads must be a whole number from 1 to 1024, got 0"),
        ({"threads": "2"}, "threads must be"),
        ({"threads": 4096}, "threads must be"),
    ],
)
def test_wrong_loading_options_are_named(checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(checkpoint, **options)


def test_a_missing_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    monkeypatch.setattr(hrmcore.engine.engine, "EMBEDDED_MODEL", tmp_path)
    with pytest.raises(FileNotFoundError, match="no embedded model: give the path"):
        load()


# --- wrong arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        (" \n", {}, "the prompt is empty"),
        (5, {}, "prompt must be text or a list of texts, got 5"),
        ("\ud800", {}, "surrogate"),
        ("1 " * 3000, {}, r"the prompt has \d+ tokens.*context of 2048 tokens"),
        ("x", {"condition": "shout"}, "unknown condition 'shout'.*direct"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ("x", {"max_new_tokens": 1.5}, "max_new_tokens must be"),
        ("x", {"temperature": -1}, "temperature must be 0 or more, got -1"),
        ("x", {"top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
        ("x", {"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ("x", {"min_p": -1}, "min_p must be between 0 and 1, got -1"),
        ("x", {"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ("x", {"seed": "one"}, "seed must be a whole number of at least 0, got 'one'"),
        ("x", {"stop": ""}, "stop must be a non-empty text or a list of them, got ''"),
        ("x", {"stop": ["a", ""]}, "stop must be"),
        ("x", {"stop": 5}, "stop must be"),
        ("x", {"stop": [5]}, "stop must be"),
    ],
)
def test_wrong_text_arguments_are_named_before_anything_runs(
    engine: Engine, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine.stream(prompt, **options)
    with pytest.raises(ValueError, match=f"prompt 1: {message}|{message}"):
        engine.generate(["fine", prompt], **options)


def test_the_wrong_prompt_of_a_batch_is_numbered(engine: Engine) -> None:
    with pytest.raises(ValueError, match="prompt 2: the prompt is empty"):
        engine.generate(["a", "b", ""])


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "at least one token"),
        (torch.tensor([], dtype=torch.int64), {}, "at least one token"),
        ([1, 61], {}, r"\[0, vocab_size=61\), got 61 at position 1"),
        ([-1], {}, "got -1 at position 0"),
        ([2**70], {}, "vocab_size=61"),
        ([1.5], {}, "ids must be whole numbers"),
        ([True], {}, "ids must be whole numbers"),
        ("12", {}, "ids must be whole numbers"),
        (3, {}, "ids must be whole numbers"),
        (None, {}, "ids must be whole numbers"),
        (torch.tensor(3), {}, "ids must be whole numbers"),
        (torch.tensor([[1, 2]]), {}, "ids must be whole numbers"),
        ([1] * 257, {}, "257 tokens, the context.*256"),
        ([1, 2], {"prefix_length": 3}, "prefix_length must be between 0 and the 2 tokens given, got 3"),
        ([1, 2], {"prefix_length": -1}, "prefix_length must be"),
        ([1, 2], {"prefix_length": 1.0}, "prefix_length must be"),
    ],
)
def test_wrong_ids_are_named(ids: Any, options: dict[str, Any], message: str) -> None:
    engine = untexted()
    with pytest.raises(ValueError, match=message):
        engine.tokens(ids, **options)
    with pytest.raises(ValueError, match=message):
        engine.logits(ids, **options)


def test_a_full_context_leaves_no_room_for_tokens() -> None:
    hrm, ids = model(max_position_embeddings=16), random_ids(16)
    engine = Engine(TorchRunner(hrm), None, Path("nowhere"))
    assert torch.equal(engine.logits(ids), hrm(torch.tensor([ids]), 16)[0])
    with pytest.raises(ValueError, match="16 tokens; it must leave room in the context of 16"):
        engine.tokens(random_ids(16))
