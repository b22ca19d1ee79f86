"""Records in two stores for a run: most to train on, some held out. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from hrmcore.data.files import expand
from hrmcore.data.prepare import FITTING, prepare
from hrmcore.data.puzzles import mixed, puzzle_tokenizer
from hrmcore.data.records import KeyCounts, Record, Rejected, read_records
from hrmcore.data.shapes import named_layout
from hrmcore.durable import new_folder

HELDOUT_SHARE, HELDOUT_MOST = 0.05, 400
_PUZZLE_SCALE = 0.1  # of the embedded model's records


@dataclass(frozen=True)
class Split:
    """How many records are in either part, and what to say of those that are in neither."""

    train: int
    heldout: int
    vocab_size: int
    notes: list[str]


def split_records(files: Sequence[str], columns: Mapping[str, str], folder: Path, context: int) -> Split:
    """Write the stores `train` and `heldout` of all records into a new folder; without files, of the puzzles.

    Which records are held out follows from the instruction, a conversation's first one, or the text:
    equal questions are never in both parts. `heldout.jsonl` keeps them as records. With less than 20 of them `heldout`
    may be missing. Raises ValueError as `prepare` does.
    """
    rejected, keys = Rejected(), KeyCounts()
    records = _records(files, columns)
    with new_folder(folder) as made:
        count = 0
        for record in records(rejected):
            keys.add(record)
            count += 1
        if not count:
            raise ValueError("no usable record: " + ("; ".join(rejected.report()) or "the files are empty"))
        train, heldout = made / "train.jsonl", made / "heldout.jsonl"
        held = _write(records(Rejected()), train, heldout, min(HELDOUT_SHARE, HELDOUT_MOST / count))
        if files:
            store = prepare([train], made / "train", new_tokenizer=FITTING, context=context)
        else:
            puzzle_tokenizer([json.loads(line) for line in train.open(encoding="utf-8")], made / "tokenizer")
            store = prepare([train], made / "train", tokenizer=made / "tokenizer", context=context)
        stores = [store]
        if held:
            stores.append(prepare([heldout], made / "heldout", tokenizer=made / "train", context=context))
        train.unlink()
        notes = [*rejected.report(), *keys.report()]
        for written in stores:
            for source in written.manifest["sources"].values():
                notes += Rejected(counts=source["left_out"], examples=source["left_out_examples"]).report()
    return Split(stores[0].manifest["records"], held, stores[0].manifest["vocab_size"], notes)


def _records(files: Sequence[str], columns: Mapping[str, str]) -> Callable[[Rejected], Iterator[Record]]:
    """A function that reads all records, each time from the start."""
    if not files:
        puzzles = mixed(_PUZZLE_SCALE)
        return lambda rejected: (
            Record(puzzle["instruction"], puzzle["response"], puzzle["condition"], f"{puzzle['task']}:{number}")
            for number, puzzle in enumerate(puzzles, start=1)
        )
    paths, layout = expand(files), named_layout(columns)
    return lambda rejected: chain.from_iterable(read_records(path, rejected, layout=layout) for path in paths)


def _write(records: Iterable[Record], train: Path, heldout: Path, share: float) -> int:
    """Write every record into one of the two files; returns how many are held out, a `share` of the questions."""
    held, source, chosen = 0, "", False
    with train.open("w", encoding="utf-8") as kept, heldout.open("w", encoding="utf-8") as apart:
        for record in records:
            if record.source != source:  # a conversation's answers stay together
                asked = record.instruction or record.response
                digest = hashlib.sha256(asked.encode("utf-8", "surrogatepass")).digest()
                source, chosen = record.source, int.from_bytes(digest[:8], "big") < share * (1 << 64)
            values = {"instruction": record.instruction, "response": record.response, "condition": record.condition}
            if record.is_text:
                values = {"text": record.response, "condition": record.condition}
            if not chosen:  # the puzzles' tokenizer goes by task
                values["task"] = record.source.partition(":")[0]
            (apart if chosen else kept).write(json.dumps(values) + "\n")
            held += chosen
    return held
