"""`hrmcore prepare`: records in, a token store out. Imports no torch, so its worker processes stay small."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hrmcore.data.files import Row, expand, is_json_lines, source_name
from hrmcore.data.records import KeyCounts, Rejected, read_records
from hrmcore.data.shapes import Layout, named_layout, read_shaped
from hrmcore.data.store import TOKENIZER, Store, TokenWriter, open_store, tokenizer_of, write_index, write_manifest
from hrmcore.data.tokenising import Lines, mapper
from hrmcore.durable import new_folder, sha256_of
from hrmcore.limits import MOST_PARSED
from hrmcore.tokenizer import Tokenizer, VocabularyError, tokenizer_files, train_tokenizer

_MOST_WEIGHT = 100  # of a source: every record is in the store so often
_BATCH_LINES = 512  # what a worker gets at once: so many lines,
_BATCH_BYTES = 1 << 20  # or so many bytes if that is less
_TOKENIZER_BYTES = 1 << 28  # a new tokenizer sees at most so much, spread evenly over the files
FITTING = 0  # a size of vocabulary: whichever fits the texts
# Characters of text up to which a vocabulary of this size is proposed.
_VOCABULARIES = ((300_000, 384), (3_000_000, 512), (30_000_000, 1024), (100_000_000, 4096), (1_000_000_000, 16384))


@dataclass
class _Source:
    """All records of one name. `rejected` tells what was left out, with the place of the first few.

    `keys` counts what was taken from the usable ones, before a cap. `read` counts a conversation's answers, and the
    pieces of a text.
    """

    files: list[dict[str, Any]] = field(default_factory=list)
    read: int = 0
    conversations: int = 0
    texts: int = 0
    rejected: Rejected = field(default_factory=Rejected)
    keys: KeyCounts = field(default_factory=KeyCounts)


@dataclass
class _Index:
    """What is remembered of every usable record: tokens with eoa, prefix, source and condition (numbers)."""

    lengths: np.ndarray
    prefix: np.ndarray
    source: np.ndarray
    condition: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[_Index]) -> _Index:
        """One after the other."""
        columns = ((getattr(part, name) for part in parts) for name in ("lengths", "prefix", "source", "condition"))
        return cls(*(np.concatenate(list(column)) for column in columns))

    def where(self, kept: np.ndarray) -> _Index:
        """Those of the records that are `kept` (N booleans)."""
        return _Index(self.lengths[kept], self.prefix[kept], self.source[kept], self.condition[kept])


def prepare(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    new_tokenizer: int | None = None,
    context: int = 4096,
    columns: Mapping[str, str] | None = None,
    caps: Mapping[str, int] | None = None,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
    strict: bool = False,
    workers: int | None = None,
) -> Store:
    """Tokenise record files into a store at `out`, with the tokenizer of a folder or a new one of that size.

    `new_tokenizer` FITTING takes a size that fits how much text there is.

    A file is JSON lines, a JSON array, CSV or Parquet, perhaps compressed; a name may be a glob pattern. `columns` says
    which key or column holds the instruction, the response and so on, where it cannot be told from their names. A
    source is a file's name without its endings. `caps` limits the records of some sources: they are chosen by `seed`,
    evenly over the source's conditions and over its files from end to end. `weights` says how often an epoch sees the
    records of some sources, after caps: at 2.5 all of them twice, and half of them once more. Records keep the order of
    the files, repeated ones follow, and the store is the same for any number of workers. `out` appears only once it is
    complete.

    Raises FileExistsError when `out` exists, ValueError on arguments, on files without a usable record, and, if
    `strict`, on the first record that cannot be used.
    """
    paths, caps, layout = expand(files), dict(caps or {}), named_layout(columns or {})
    weights = dict(weights or {})
    workers = os.cpu_count() or 1 if workers is None else workers
    _check_arguments(paths, context, caps, weights, workers)
    with new_folder(Path(out)) as folder:
        if new_tokenizer is None:
            _copy_tokenizer(tokenizer_of(tokenizer or "."), folder / TOKENIZER)
        else:
            _train_tokenizer(paths, layout, folder / TOKENIZER, new_tokenizer)
        ids = Tokenizer.load(folder / TOKENIZER)
        names = list(dict.fromkeys(map(source_name, paths)))
        sources, conditions = {name: _Source() for name in names}, list[str]()
        writer = TokenWriter(folder, ids.vocab_size)
        rows = _batches(paths, sources, layout)
        index = _tokenise(paths, rows, sources, conditions, writer, folder / TOKENIZER, context, strict, workers)
        _cap_by_weight(index, names, caps, weights)
        kept = _choose(index, names, caps, seed)
        if not kept.all():
            writer.keep(np.concatenate([[0], np.cumsum(index.lengths)]), kept)
        chosen, beyond = index.where(kept), index.where(~kept)
        repeated = [chosen.where(again) for again in _repeats(chosen, names, weights, seed)]
        for again in _repeats(chosen, names, weights, seed):
            writer.repeat(np.concatenate([[0], np.cumsum(chosen.lengths)]), again)
        writer.close()
        everything = _Index.joined([chosen, *repeated])
        write_index(folder, everything.lengths, everything.prefix)
        counts = _counts(chosen, beyond, sources, conditions, caps, weights)
        made = {
            "context": context,
            "seed": seed,
            "vocab_size": ids.vocab_size,
            "tokenizer_sha256": sha256_of(ids.source),
        }
        totals = {
            "records": len(everything.lengths),
            "tokens": int(everything.lengths.sum()),
            "longest": int(chosen.lengths.max()) - 1,
        }
        write_manifest(folder, totals | made | counts)
    return open_store(out)


def _counts(
    chosen: _Index,
    beyond: _Index,
    sources: Mapping[str, _Source],
    conditions: Sequence[str],
    caps: Mapping[str, int],
    weights: Mapping[str, float],
) -> dict[str, Any]:
    """What the manifest says of each condition and source; `beyond` are the records that the caps leave out.

    A repeated record counts once.
    """
    return {
        "conditions": {name: int((chosen.condition == i).sum()) for i, name in enumerate(conditions)},
        "sources": {
            name: {
                "files": source.files,
                "read": source.read,
                "conversations": source.conversations,
                "texts": source.texts,
                "kept": int((chosen.source == i).sum()),
                "cap": caps.get(name),
                "weight": weights.get(name),
                "beyond_cap": int((beyond.source == i).sum()),
                "left_out": source.rejected.counts,
                "left_out_examples": source.rejected.examples,
                "joined_keys": dict(source.keys.joined),
                "unused_keys": dict(source.keys.unused),
            }
            for i, (name, source) in enumerate(sources.items())
        },
    }


def _check_arguments(
    paths: Sequence[Path], context: int, caps: Mapping[str, int], weights: Mapping[str, float], workers: int
) -> None:
    for name, value in (("context", context), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if empty := sorted(name for name, cap in caps.items() if cap < 1):
        raise ValueError(f"--cap {empty[0]}={caps[empty[0]]} leaves no record; it must be at least 1")
    seen: set[Path] = set()
    for path in paths:
        with path.open("rb"):  # a missing file is named before hours of work
            pass
        if path.resolve() in seen:
            raise ValueError(f"{path}: is given twice")
        seen.add(path.resolve())
    for name, weight in weights.items():
        if not 0 < weight <= _MOST_WEIGHT:
            raise ValueError(f"--weight {name}={weight:g} must be above 0 and at most {_MOST_WEIGHT}")
    stems = set(map(source_name, paths))
    for option, named in (("--cap", caps), ("--weight", weights)):
        if unknown := sorted(set(named) - stems):
            raise ValueError(f"{option} names {unknown[0]!r}, but the sources are {', '.join(sorted(stems))}")


def _copy_tokenizer(source: Path, target: Path) -> None:
    Tokenizer.load(source)
    target.mkdir()
    for file in tokenizer_files(source):
        shutil.copyfile(file, target / file.name)


def _train_tokenizer(paths: Sequence[Path], layout: Layout | None, folder: Path, size: int) -> None:
    """One of `size` tokens; FITTING: of a size by the amount of text, or the nearest that the text can fill."""
    fitting = size == FITTING
    if fitting:
        size = vocabulary_for(sum(map(len, _texts(paths, layout))))
    try:
        train_tokenizer(_texts(paths, layout), folder, size)
    except VocabularyError as refused:
        if not fitting or refused.fits is None:
            raise
        train_tokenizer(_texts(paths, layout), folder, refused.fits)


def vocabulary_for(characters: int) -> int:
    """The size of a vocabulary that is proposed for so much text."""
    return next((tokens for most, tokens in _VOCABULARIES if characters <= most), 32768)


def _texts(paths: Sequence[Path], layout: Layout | None = None) -> Iterator[str]:
    """Instructions and responses to train a tokenizer on: of every n-th record, if all would be too much."""
    stride = -(-sum(path.stat().st_size for path in paths) // _TOKENIZER_BYTES)
    rejected, usable = Rejected(), 0
    records = itertools.chain.from_iterable(read_records(path, rejected, layout=layout) for path in paths)
    chosen = itertools.islice(records, 0, None, max(1, stride))
    for record in tqdm(chosen, desc="tokenizer", unit="record", disable=None):
        usable += 1
        for text in (record.instruction, record.response):
            if text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text):
                yield text  # one with a lone surrogate is no text; tokenising reports it
    if not usable:
        raise ValueError("no usable record: " + ("; ".join(rejected.report()) or "the files are empty"))


def _cap_by_weight(index: _Index, names: Sequence[str], caps: dict[str, int], weights: Mapping[str, float]) -> None:
    """Write weights below 1 as caps."""
    for number, name in enumerate(names):
        if (weight := weights.get(name, 1.0)) < 1:
            found = int((index.source == number).sum())
            caps[name] = max(1, round(weight * min(found, caps.get(name, found))))


def _repeats(index: _Index, names: Sequence[str], weights: Mapping[str, float], seed: int) -> Iterator[np.ndarray]:
    """For each time that some records come once more: which, as N booleans."""
    times = np.asarray([max(1.0, weights.get(name, 1.0)) for name in names])[index.source]
    for number, name in enumerate(names):
        records, (part, _) = np.flatnonzero(index.source == number), math.modf(max(1.0, weights.get(name, 1.0)))
        if count := round(part * len(records)):  # the fraction: some of them, evenly, once more
            rng = np.random.default_rng([seed, number, 1])
            times[records[stratified(index.condition[records], count, rng)]] += 1
    for again in range(2, int(times.max(initial=1)) + 1):
        yield times >= again


def _choose(index: _Index, names: Sequence[str], caps: Mapping[str, int], seed: int) -> np.ndarray:
    """Which records the caps keep, as N booleans."""
    kept = np.ones(len(index.source), dtype=bool)
    for number, name in enumerate(names):
        records = np.flatnonzero(index.source == number)
        if (cap := caps.get(name, len(records))) < len(records):
            kept[records] = False
            rng = np.random.default_rng([seed, number])
            kept[records[stratified(index.condition[records], cap, rng)]] = True
    return kept


def stratified(strata: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Positions (count) of a sample, ascending: one at random from each of `count` equal stretches.

    The stretches run through the strata one after the other, and through each from end to end. Every stratum and every
    part of it thus has its share to within one record.
    """
    order = np.argsort(strata, kind="stable")
    bounds = np.arange(count + 1) * len(order) // count
    return np.sort(order[bounds[:-1] + (rng.random(count) * np.diff(bounds)).astype(np.int64)])


def _tokenise(
    paths: Sequence[Path],
    batches: Iterator[Lines],
    sources: Mapping[str, _Source],
    conditions: list[str],
    writer: TokenWriter,
    tokenizer: Path,
    context: int,
    strict: bool,
    workers: int,
) -> _Index:
    """Tokenise all files into `writer`, batch after batch in their order; fills `sources` and `conditions`."""
    numbers = {name: number for number, name in enumerate(sources)}
    known: dict[str, int] = {}
    parts: list[_Index] = []
    known_size = all(map(is_json_lines, paths))  # of the lines that will be read
    total = sum(path.stat().st_size for path in paths) if known_size else None
    with (
        mapper(tokenizer, context, workers) as ordered_map,
        tqdm(total=total, desc="tokenising", unit="B", unit_scale=True, disable=None) as bar,
    ):
        for batch, encoded in ordered_map(batches):
            name = source_name(batch.path)
            sources[name].read += len(encoded.lengths) + len(encoded.rejected)
            sources[name].conversations += encoded.conversations
            sources[name].texts += encoded.texts
            for number, fault in encoded.rejected:
                if strict:
                    raise ValueError(f"{fault.place(f'{batch.path}:{number}')}: {fault.reason}")
                sources[name].rejected.add(fault.place(f"{batch.path.name}:{number}"), fault.reason)
            sources[name].keys.update(encoded.keys)
            writer.append(encoded.tokens)
            codes = [known.setdefault(condition, len(known)) for condition in encoded.conditions]
            parts.append(
                _Index(
                    encoded.lengths,
                    encoded.prefix,
                    np.full(len(codes), numbers[name], dtype=np.int32),
                    np.asarray(codes, dtype=np.int32),
                )
            )
            bar.update(sum(len(row.line) for row in batch.rows))
    conditions.extend(known)
    if not sum(len(part.lengths) for part in parts):
        reports = [f"{name}: {line}" for name, source in sources.items() for line in source.rejected.report()]
        raise ValueError("no usable record: " + ("; ".join(reports) or "the files are empty"))
    return _Index.joined(parts)


def _batches(paths: Sequence[Path], sources: Mapping[str, _Source], layout: Layout | None) -> Iterator[Lines]:
    """The files' rows in batches; a file's size and checksum join its source when its last row is read."""
    for path in paths:
        digest, size, whole = hashlib.sha256(), 0, is_json_lines(path)
        everything = read_shaped(path, layout)
        while rows := list(_take(everything)):
            yield Lines(path, [row for row, _ in rows], rows[-1][1])
            for row, _ in rows:
                digest.update(row.line)
                size += len(row.line)
                whole = whole and len(row.line) <= MOST_PARSED
        sha256 = digest.hexdigest()
        if not whole:  # its rows are made of it, or cut, they are not what it holds
            size, sha256 = path.stat().st_size, sha256_of(path)
        sources[source_name(path)].files.append({"name": path.name, "bytes": size, "sha256": sha256})


def _take(rows: Iterator[tuple[Row, Layout | None]]) -> Iterator[tuple[Row, Layout | None]]:
    size = 0
    for shaped in itertools.islice(rows, _BATCH_LINES):
        yield shaped
        size += len(shaped[0].line)
        if size >= _BATCH_BYTES:
            return
