"""What a record became, for a person to look at: its tokens, which are prefix, and which carry loss."""

from __future__ import annotations

from collections.abc import Iterator

from hrmcore.data.records import Corpus
from hrmcore.tokenizer import Tokenizer

_PREFIX, _LOSS, _FRAMING, _PLAIN = "\x1b[34m", "\x1b[32m", "\x1b[2m", "\x1b[0m"


def shown(corpus: Corpus, tokenizer: Tokenizer, count: int, colour: bool) -> Iterator[str]:
    """Lines for the first `count` records. Tokens are separated by "|"; the prefix is blue, what carries loss green."""
    for record in range(min(count, len(corpus))):
        tokens = corpus.tokens[corpus.offsets[record] : corpus.offsets[record + 1]].tolist()
        prefix = int(corpus.prefix[record])
        yield f"record {corpus.describe(record)}: {len(tokens)} tokens"
        for name, part, style in (("prefix", tokens[:prefix], _PREFIX), ("loss", tokens[prefix:], _LOSS)):
            pieces = [_piece(token, tokenizer, style if colour else "") for token in part]
            yield f"  {name:<6} {len(part):>5}  {'|'.join(pieces)}"


def _piece(token: int, tokenizer: Tokenizer, style: str) -> str:
    """A token's text on one line; a framing token by its role, a part of a character by its number."""
    roles = {tokenizer.boq: "boq", tokenizer.eoq: "eoq", tokenizer.eoa: "eoa"}
    roles |= {index: name for name, index in tokenizer.condition_ids.items()}
    if token in roles:
        text, style = f"<{roles[token]}>", style and _FRAMING + style
    else:
        text = tokenizer.decode([token]).replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        text = text if text.isprintable() and text and "\ufffd" not in text else f"#{token}"
    return f"{style}{text}{_PLAIN}" if style else text
