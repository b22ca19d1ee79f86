"""Log probabilities in OpenAI's two protocols: what a request may ask for, and their JSON.

Source: the API reference at platform.openai.com.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hrmcore.engine.engine import MOST_LOGPROBS
from hrmcore.engine.sampling import is_integer, require
from hrmcore.engine.streams import TokenLogprob, TokenScore

MOST_IN_COMPLETIONS = 5


def asked_for(given: Mapping[str, Any], chat: bool) -> int | None:
    """How many of the most probable tokens to report beside each token; None: nothing. Raises ValueError."""
    asked = given.get("logprobs")
    if not chat:
        fits = asked is None or (is_integer(asked) and 0 <= asked <= MOST_IN_COMPLETIONS)
        require(fits, "logprobs", f"a whole number from 0 to {MOST_IN_COMPLETIONS}", asked)
        return asked
    require(asked is None or isinstance(asked, bool), "logprobs", "true or false", asked)
    top = given.get("top_logprobs", 0)
    fits = is_integer(top) and 0 <= top <= MOST_LOGPROBS
    require(fits, "top_logprobs", f"a whole number from 0 to {MOST_LOGPROBS}", top)
    if top and not asked:
        raise ValueError("top_logprobs goes with logprobs: true")
    return int(top) if asked else None


def in_chat(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """A choice's `logprobs` in a chat completion, or those of a chunk."""
    content = [{**_token(one), "top_logprobs": [_token(top) for top in one.top]} for one in logprobs]
    return {"content": content, "refusal": None}


def _token(one: TokenScore) -> dict[str, Any]:
    whole = "\ufffd" not in one.text  # a part of a character has no bytes of its own here
    return {"token": one.text, "logprob": one.logprob, "bytes": list(one.text.encode()) if whole else None}


def in_completion(logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """A choice's `logprobs` in a completion, or those of a chunk whose text begins at `offset` in the answer."""
    offsets = []
    for one in logprobs:
        offsets.append(offset)
        offset += len(one.text)
    return {
        "tokens": [one.text for one in logprobs],
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": [{top.text: top.logprob for top in one.top} for one in logprobs],
        "text_offset": offsets,
    }
