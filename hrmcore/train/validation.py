"""How good a model is on validation records while it trains: loss, right answers, and a few answers to look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hrmcore.config import HRMConfig
from hrmcore.data.packing import BatchStream, epoch_batches, pack
from hrmcore.data.records import Corpus
from hrmcore.engine.runner import Runner
from hrmcore.model import HRM
from hrmcore.tokenizer import Tokenizer

_SAMPLE_TOKENS = 48  # the most of an answer that is shown while a run goes on


@torch.no_grad()
def mean_loss(model: HRM, corpus: Corpus, batch_tokens: int) -> float:
    """Loss a supervised token over all records, in nats."""
    total, count = 0.0, 0
    for records in epoch_batches(corpus.lengths, batch_tokens, seed=0, epoch=0):
        batch = pack(corpus, records, BatchStream.MULTIPLE)
        total += float(model.loss(batch))
        count += len(batch.targets)
    return total / count


@torch.no_grad()
def exact_matches(model: HRM, corpus: Corpus, count: int, batch_tokens: int) -> float:
    """Share of `count` records, evenly spread over the corpus, that greedy decoding answers with the exact response.

    No decoding is needed for that. An answer is right if and only if, after every prefix of the right response, the
    likeliest token is the next token of that response.
    """
    chosen = np.unique(np.linspace(0, len(corpus) - 1, min(count, len(corpus))).astype(np.int64))
    right = 0
    for batch_indices in epoch_batches(corpus.lengths[chosen], batch_tokens, seed=0, epoch=0):
        batch = pack(corpus, [int(chosen[index]) for index in batch_indices], BatchStream.MULTIPLE)
        wrong = batch.supervised[model.greedy_tokens(batch).to(batch.targets.device) != batch.targets]
        sequences = torch.bucketize(wrong, batch.offsets[1:].long(), right=True)
        right += len(batch.records) - len(sequences.unique())
    return right / len(chosen)


@torch.no_grad()
def greedy_answers(model: HRM, corpus: Corpus, records: Sequence[int], most: int, eoa: int) -> list[list[int]]:
    """Greedy answers to the instructions of some records, without eoa, each of at most `most` tokens.

    Every token is a pass over whole sequences: right for a few records, and for no more.
    """
    prompts, room = _asked(model.config, corpus, records, most)
    answers: list[list[int]] = [[] for _ in records]
    unfinished = [number for number in range(len(records)) if room[number] > 0]
    while unfinished:
        sequences = [[*prompts[number], *answers[number], 0] for number in unfinished]  # the last is only a target
        asked = Corpus(
            np.concatenate(sequences),
            np.cumsum([0, *map(len, sequences)]),
            np.asarray([len(prompts[number]) for number in unfinished], dtype=np.int32),
        )
        found = model.greedy_tokens(pack(asked, range(len(unfinished)), BatchStream.MULTIPLE)).tolist()
        end, going_on = -1, []
        for number in unfinished:
            end += len(answers[number]) + 1
            if found[end] != eoa:
                answers[number].append(found[end])
                if len(answers[number]) < room[number]:
                    going_on.append(number)
        unfinished = going_on
    return answers


def decoded_answers(runner: Runner, corpus: Corpus, records: Sequence[int], most: int, eoa: int) -> list[list[int]]:
    """What `greedy_answers` gives, by a cache of keys and values: each token costs a step instead of a pass."""
    prompts, room = _asked(runner.config, corpus, records, most)
    answers: list[list[int]] = [[] for _ in records]
    unfinished = [number for number in range(len(records)) if room[number] > 0]
    if not unfinished:
        return answers
    asked = [prompts[number] for number in unfinished]
    opened, rows = runner.open(asked, [len(prompt) for prompt in asked])
    handles = dict(zip(unfinished, opened, strict=True))
    try:
        while unfinished:
            going_on = []
            for number, token in zip(unfinished, rows.argmax(-1).tolist(), strict=True):
                if token != eoa:
                    answers[number].append(token)
                    if len(answers[number]) < room[number]:
                        going_on.append(number)
            unfinished = going_on
            if unfinished:
                last = [answers[number][-1] for number in unfinished]
                rows = runner.step([handles[number] for number in unfinished], last)
    finally:
        for handle in opened:
            runner.close(handle)
    return answers


def decoder_of(model: HRM) -> Runner | None:
    """The engine on CUDA over a copy of the model in bfloat16; None where its kernels do not take the model.

    Two copies, 4 bytes a parameter in all: what the gradients took, which a step has let go of.
    """
    from hrmcore.engine.cuda_runner import CudaRunner

    with torch.device("meta"):
        rounded = HRM(model.config).requires_grad_(False)
    rounded.load_state_dict({name: x.bfloat16() for name, x in model.state_dict().items()}, assign=True)
    try:
        return CudaRunner(rounded.eval())
    except ValueError:
        return None


def _asked(config: HRMConfig, corpus: Corpus, records: Sequence[int], most: int) -> tuple[list[list[int]], list[int]]:
    """The instructions of some records, and how many tokens each answer may have."""
    prompts = [corpus.tokens[corpus.offsets[r] : corpus.offsets[r] + corpus.prefix[r]].tolist() for r in records]
    return prompts, [min(most, config.max_position_embeddings - len(prompt)) for prompt in prompts]


def sample_answers(
    model: HRM, corpus: Corpus, count: int, tokenizer: Tokenizer, runner: Runner | None = None
) -> list[dict[str, str]]:
    """Instruction, expected and greedy answer of `count` records, evenly spread over the corpus, as texts.

    A `runner` over the same weights decodes them; without one the model does, in whole passes.
    """
    chosen = np.unique(np.linspace(0, len(corpus) - 1, count).astype(np.int64)).tolist()
    if runner is None:
        answers = greedy_answers(model, corpus, chosen, _SAMPLE_TOKENS, tokenizer.eoa)
    else:
        answers = decoded_answers(runner, corpus, chosen, _SAMPLE_TOKENS, tokenizer.eoa)
    samples = []
    for record, answer in zip(chosen, answers, strict=True):
        sequence = corpus.tokens[corpus.offsets[record] : corpus.offsets[record + 1]].tolist()
        prefix = int(corpus.prefix[record])
        parts = {"instruction": sequence[:prefix], "expected": sequence[prefix:], "answer": answer}
        samples.append({key: tokenizer.decode_answer(part) for key, part in parts.items()})
    return samples


def shortened(text: str) -> str:
    """A text on one line, its middle left out where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:28]} … {line[-28:]}"
