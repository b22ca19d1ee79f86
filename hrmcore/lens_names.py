"""How a lens names what it shows: the steps of the recurrence, and tokens. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hrmcore.config import HRMConfig
from hrmcore.tokenizer import Tokenizer


def places(config: HRMConfig) -> Iterator[tuple[int, int, str, int]]:
    """(h, l, stack, layer) of each layer of each visit, in order. All count from 0; l is L_cycles for H."""
    for h in range(config.H_cycles):
        for l in range(config.L_cycles + 1):  # noqa: E741
            for layer in range(config.depths[l == config.L_cycles]):
                yield h, l, "L" if l < config.L_cycles else "H", layer


def visit_name(h: int, stack: str, l: int) -> str:  # noqa: E741
    """How a visit is called, counted from 1: L1.2 is the second L step of the first H cycle, H1 that cycle's H step."""
    return f"L{h + 1}.{l + 1}" if stack == "L" else f"H{h + 1}"


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token as a person reads it: framing tokens by their names, white space visible, a part of a character as �."""
    framing = {"<boq>": tokenizer.boq, "<eoq>": tokenizer.eoq, "<eoa>": tokenizer.eoa}
    framing |= {f"<{condition}>": index for condition, index in tokenizer.condition_ids.items()}
    for text, index in framing.items():
        if token == index:
            return text
    if token >= tokenizer.vocab_size:
        return f"#{token}"  # a row of the head that no word belongs to
    text = tokenizer.decode([token]).replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", text) or f"#{token}"
