"""Sample answers by a cache of keys and values: those of whole passes, and when a run takes which."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.emulator import emulated_cuda
from support.runs import rewrite

from hrmcore.config import HRMConfig, LoraConfig
from hrmcore.data.records import Corpus
from hrmcore.engine.cuda_runner import CudaRunner
from hrmcore.engine.torch_runner import TorchRunner
from hrmcore.model import HRM
from hrmcore.train import validation
from hrmcore.train.run_file import read_config
from hrmcore.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread", "no_peak")

TOLERANCE = 2e-2  # of the logits' norm, as in tests/engine/test_cuda_step.py


def model_of(**changes: Any) -> HRM:
    torch.manual_seed(0)
    shape = {"vocab_size": 41, "hidden_size": 32, "intermediate_size": 48, "num_layers_per_stack": 1}
    heads = {"num_attention_heads": 2, "head_dim": 16, "H_cycles": 2, "L_cycles": 2, "max_position_embeddings": 64}
    return HRM(HRMConfig(**(shape | heads | changes)))


def corpus_of(lengths: list[tuple[int, int]]) -> Corpus:
    """Records of so many tokens of instruction and of response."""
    whole = [prompt + response for prompt, response in lengths]
    tokens = np.random.default_rng(0).integers(41, size=sum(whole), dtype=np.int32)
    return Corpus(tokens, np.cumsum([0, *whole]), np.asarray([prompt for prompt, _ in lengths], dtype=np.int32))


RECORDS = corpus_of([(1, 3), (9, 2), (62, 2), (63, 1), (17, 5)])  # two that reach the end of the context


@pytest.mark.parametrize("changes", [{}, {"prefix_lm": False}, {"position_encoding": "xpos", "xpos_scale_base": 64}])
def test_a_runner_answers_as_whole_passes_do(changes: dict[str, Any]) -> None:
    """In float32 the two differ in the order of sums alone; `eoa` is each token that an answer holds, once."""
    model = model_of(**changes)
    records = range(len(RECORDS))
    plain = validation.greedy_answers(model, RECORDS, records, 6, -1)
    assert [len(answer) for answer in plain] == [6, 6, 2, 1, 6]
    runner = TorchRunner(model)
    for eoa in (-1, *{token for answer in plain for token in answer}):
        found = validation.decoded_answers(runner, RECORDS, records, 6, eoa)
        assert found == validation.greedy_answers(model, RECORDS, records, 6, eoa)
    assert runner.open_sequences == 0


def test_a_prompt_that_fills_the_context_has_no_answer() -> None:
    full = corpus_of([(64, 1)])
    assert validation.decoded_answers(TorchRunner(model_of()), full, [0], 6, -1) == [[]]


@pytest.mark.emulated
def test_the_decode_step_answers_within_its_rounding() -> None:
    """Each token beside a float32 pass over what was answered before it: the likeliest, or as likely but for bfloat16.

    An error of 2% of the logits' norm at each of two tokens can exchange them; half of all tokens lie farther off.
    """
    model, records = model_of(), [0, 1, 4]
    with emulated_cuda():
        runner = validation.decoder_of(model)
        assert isinstance(runner, CudaRunner)
        answers = validation.decoded_answers(runner, RECORDS, records, 3, -1)
    assert model.lm_head.weight.dtype == torch.float32
    for record, answer in zip(records, answers, strict=True):
        start, prefix = int(RECORDS.offsets[record]), int(RECORDS.prefix[record])
        prompt = RECORDS.tokens[start : start + prefix].tolist()
        logits = model(torch.tensor([[*prompt, *answer]]), prefix_length=prefix)[0, prefix - 1 : -1]
        assert len(answer) == 3
        for row, token in zip(logits.detach(), answer, strict=True):
            assert row.max() - row[token] <= 2 * TOLERANCE * row.norm()
            assert (row.max() - row > 2 * TOLERANCE * row.norm()).sum() > 20


@pytest.mark.emulated
def test_a_model_that_the_step_does_not_take_is_left_to_whole_passes() -> None:
    with emulated_cuda():
        assert validation.decoder_of(model_of(head_dim=24)) is None


def test_a_run_shows_the_same_answers_by_a_runner(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the averaged weights, which a runner must be made of anew at each validation."""
    path = rewrite(run_file, "seed = 7", "seed = 7\nema = 0.5")
    found = []
    for name in ("passes", "runner"):
        config = dataclasses.replace(read_config(path), out=f"{path.parent}/{name}")
        Trainer(config).run()
        found.append([json.loads(line) for line in (Path(config.out) / "samples.jsonl").read_text().splitlines()])
        monkeypatch.setattr(Trainer, "_decoder", lambda self: TorchRunner(self.model))
    assert len(found[0]) == 4
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("keys", "decodes"),
    [
        ({"precision": "bfloat16"}, True),
        ({"precision": "float32"}, False),  # its answers would be rounded
        ({"precision": "bfloat16", "lora": LoraConfig()}, False),
    ],
)
def test_which_runs_decode(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, keys: Any, decodes: bool) -> None:
    """On a GPU, whole models in bfloat16."""
    runner = object()
    monkeypatch.setattr(validation, "decoder_of", lambda model: runner)
    for name, value in keys.items():
        object.__setattr__(trainer.config, name, value)
    assert trainer._decoder() is None
    monkeypatch.setattr(trainer.world, "device", torch.device("cuda"))
    assert (trainer._decoder() is runner) is decodes
    trainer._sharded = True
    assert trainer._decoder() is None
