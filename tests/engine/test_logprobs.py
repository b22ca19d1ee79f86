"""Log probabilities of tokens: against torch, whole and streamed, in batches, and cut by stop strings."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from hrmcore import _C
from hrmcore.engine.async_engine import AsyncEngine
from hrmcore.engine.engine import Engine
from hrmcore.model import HRM

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "what is 3 plus 4?"
DRAWN = {"temperature": 1.3, "seed": 2, "repetition_penalty": 1.5, "top_k": 50}


@pytest.mark.parametrize("vocabulary", [1, 2, 300, 70000])
def test_they_are_torchs_log_softmax(vocabulary: int) -> None:
    torch.manual_seed(0)
    logits = 10 * torch.randn(3, vocabulary)
    logits[1] = torch.randint(-3, 3, (vocabulary,))  # many that are equal
    expected = torch.log_softmax(logits.double(), 1)
    tokens, tops = [vocabulary - 1, 0, vocabulary // 2], [0, 20, 5]
    found = _C.log_probabilities(logits.numpy(), tokens, tops)
    for row, ((token, own), *top) in enumerate(found):
        # V terms are summed in float64, in another order.
        assert abs(own - expected[row, tokens[row]].item()) <= 2 * vocabulary * 2**-53 + 1e-14
        assert token == tokens[row]
        order = sorted(range(vocabulary), key=lambda index: (-logits[row, index].item(), index))
        assert [index for index, _ in top] == order[: tops[row]]
        for index, value in top:
            assert abs(value - expected[row, index].item()) <= 2 * vocabulary * 2**-53 + 1e-14


def test_wrong_arguments_are_named() -> None:
    logits = np.zeros((1, 5), np.float32)
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 5\), got 5"):
        _C.log_probabilities(logits, [5], [0])
    with pytest.raises(ValueError, match="top must be at least 0"):
        _C.log_probabilities(logits, [0], [-1])
    with pytest.raises(ValueError, match="top must be as many as tokens"):
        _C.log_probabilities(logits, [0], [])


@pytest.mark.parametrize("options", [{}, DRAWN])
def test_an_answers_are_the_models_own(engine: Engine, checkpoint: Path, options: dict[str, float]) -> None:
    """Those of the reference model in torch, whatever penalty, temperature and filters made of them."""
    scored = engine.generate(PROMPT, logprobs=5, max_new_tokens=12, **options)  # type: ignore[call-overload]
    assert scored.text == engine.generate(PROMPT, max_new_tokens=12, **options)  # type: ignore[arg-type]
    assert (scored.finish, len(scored.logprobs)) == ("length", 12)
    tokenizer = engine.text_tokenizer()
    prompt, answer = tokenizer.prompt(PROMPT), [one.token for one in scored.logprobs]
    ids = torch.tensor([[*prompt, *answer]])
    with torch.inference_mode():
        logits = HRM.from_pretrained(checkpoint)(ids, len(prompt))[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits.double(), 1)
    for row, one in enumerate(scored.logprobs):
        # The logits differ as float32 sums of another order do; test_engine bounds it at 1e-4 of their norm.
        bound = 2e-4 * logits[row].norm().item()
        assert abs(one.logprob - expected[row, one.token].item()) < bound
        assert len(one.top) == 5
        for place, top in enumerate(one.top):
            assert abs(top.logprob - expected[row, top.token].item()) < bound
            assert top.logprob >= expected[row].sort(descending=True).values[place].item() - bound
        if not options:
            assert (one.top[0].token, one.top[0].logprob) == (one.token, one.logprob)
    assert any(one.token != one.top[0].token for one in scored.logprobs) is bool(options)


def test_texts_are_the_pieces_of_the_answer(engine: Engine) -> None:
    answer = engine.stream(PROMPT, logprobs=2, max_new_tokens=60, temperature=1.0, seed=4)
    text = "".join(answer)
    assert "\ufffd" in text or "".join(one.text for one in answer.logprobs) == text
    plain = [one for one in answer.logprobs if "\ufffd" not in one.text]
    assert len(plain) > 20
    assert all(one.text in text for one in plain)
    tokenizer = engine.text_tokenizer()
    for word in ("what is 3", " plus", "ü, copy"):
        assert "".join(map(tokenizer.token_text, tokenizer.encode(word))) == word
    assert tokenizer.token_text(tokenizer.eoa) == ""


def test_without_being_asked_for_there_are_none(engine: Engine) -> None:
    answer = engine.stream(PROMPT, max_new_tokens=3)
    list(answer)
    assert answer.logprobs == []
    answer = engine.stream(PROMPT, max_new_tokens=3, logprobs=0)
    list(answer)
    assert [one.top for one in answer.logprobs] == [()] * 3


@pytest.mark.parametrize("wrong", [-1, 21, 1.5, True, "5"])
def test_a_wrong_number_is_refused(engine: Engine, wrong: object) -> None:
    with pytest.raises(ValueError, match="logprobs must be a whole number from 0 to 20, or None"):
        engine.stream(PROMPT, logprobs=wrong)  # type: ignore[arg-type]


def test_a_batch_has_those_of_each_alone(engine: Engine) -> None:
    prompts = [PROMPT, "copy\n1 2\n3 4", PROMPT, "é"]
    alone = [engine.generate(prompt, logprobs=3, max_new_tokens=9) for prompt in prompts]
    assert engine.generate(prompts, logprobs=3, max_new_tokens=9) == alone


def test_tokens_of_a_stop_string_are_not_among_them(engine: Engine) -> None:
    whole = engine.generate(PROMPT, logprobs=0, max_new_tokens=40)
    texts = [one.text for one in whole.logprobs]
    cut = next(index for index, text in enumerate(texts) if index > 3 and text.isalnum() and text not in texts[:index])
    stop = texts[cut]
    if stop in "".join(texts[:cut]):
        pytest.fail("the random model repeats itself: take another prompt")
    scored = engine.generate(PROMPT, logprobs=0, max_new_tokens=40, stop=stop)
    assert (scored.finish, scored.text) == ("stop", "".join(texts[:cut]))
    assert scored.logprobs == whole.logprobs[:cut]


def test_streams_have_those_behind_their_pieces(engine: Engine) -> None:
    whole = engine.generate(PROMPT, logprobs=2, max_new_tokens=30)

    async def body() -> None:
        async with AsyncEngine(engine) as served:
            answer = served.stream(PROMPT, logprobs=2, max_new_tokens=30)
            text, seen = "", 0
            async for piece in answer:
                text += piece
                fresh = answer.logprobs_from(seen)
                seen += len(fresh)
                shown = "".join(one.text for one in answer.logprobs)
                assert "\ufffd" in shown or shown == text
            assert answer.logprobs == whole.logprobs
            assert text == whole.text

    asyncio.run(body())
