"""An xPos model from end to end: trained, grown in its run and from file to file, then generating in every dtype."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from support.runs import repetitions, write_run

import hrmcore
from hrmcore.cli import main
from hrmcore.evals.lm_eval import HRMCoreLM
from hrmcore.model import HRM
from hrmcore.train.run_file import read_config
from hrmcore.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ("alpha", "beta", "gamma", "delta")
QUESTION = "repeat alpha beta"
LONG = 200  # tokens, of a model trained on 64 with a window of 64


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that grew in width, and `grown`, which grew from its checkpoint in depth."""
    folder = tmp_path_factory.mktemp("xpos")
    xpos = {"position_encoding": "xpos", "xpos_scale_base": 64, "attention_window": 64, "intermediate_size": 40}
    stages = "[[grow]]\nat_tokens = 1000\nhidden_size = 48\n"
    keys = {"steps": 12, "batch_tokens": 256, "learning_rate": 5e-3, "warmup_steps": 2, "out": f"{folder}/run"}
    path = write_run(folder, repetitions(WORDS), model=xpos, stages=stages, **keys)
    Trainer(read_config(path)).run()
    assert main(["grow", str(folder / "run" / "checkpoint"), str(folder / "grown"), "--layers", "2"]) == 0
    return folder


def test_growing_keeps_the_encoding_the_window_and_the_function(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    [grown] = [row for row in rows if "grown_parameters" in row]
    assert grown["growth_loss_after"] == pytest.approx(grown["growth_loss_before"], rel=1e-5)
    assert rows[-1]["loss"] < rows[0]["loss"]
    wide, deep = (HRM.from_pretrained(trained / name) for name in ("run/checkpoint", "grown"))
    for model, layers in ((wide, 1), (deep, 2)):
        config = model.config
        assert (config.position_encoding, config.xpos_scale_base, config.attention_window) == ("xpos", 64, 64)
        assert (config.hidden_size, config.num_layers_per_stack) == (48, layers)
    ids = torch.randint(300, (1, LONG), generator=torch.Generator().manual_seed(0))
    assert torch.equal(wide(ids, 100), deep(ids, 100))


def test_a_plain_export_of_it_is_refused(trained: Path, tmp_path: Path) -> None:
    model = HRM.from_pretrained(trained / "grown")
    with pytest.raises(ValueError, match=r"position_encoding is 'xpos': readers of the hrm_text format would compute"):
        model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_it_is_inspected_and_evaluated_beyond_its_training_length(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = "repeat alpha beta " * 20
    assert main(["inspect", question, "--model", str(trained / "grown")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("H2 ")
    lm = HRMCoreLM(str(trained / "grown"), dtype="float32")
    asked = [Instance("loglikelihood", {}, (context, " beta"), 0) for context in (question, "alpha " + question)]
    short, long = lm.loglikelihood(asked, disable_tqdm=True)
    assert short != long  # nothing was cut off


# Of bfloat16 weights, as the trainer exports them: float32 and bfloat16 hold them exactly.
ERRORS = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 5e-2, "int4": 0.5}


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_it_generates_in_every_dtype_beyond_its_training_length(
    trained: Path, dtype: str, kv_dtype: str | None
) -> None:
    """From 150 to 200 tokens, three times the training length, each token after the one before it."""
    engine = hrmcore.load(trained / "grown", dtype=dtype, kv_dtype=kv_dtype)
    assert isinstance(engine.generate(QUESTION, max_new_tokens=8), str)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(10, 300, (150,), generator=generator).tolist()
    answer = list(engine.tokens(prompt, prefix_length=100, max_new_tokens=LONG - 150, ignore_eos=True))
    assert len(answer) == LONG - 150
    model = HRM.from_pretrained(trained / "grown")
    with torch.no_grad():
        exact = model(torch.tensor([[*prompt, *answer]]), 100)[0]
    found = torch.as_tensor(engine.logits([*prompt, *answer], prefix_length=100))
    error = float((found[-20:] - exact[-20:]).norm() / exact[-20:].norm())
    assert error < (max(ERRORS[dtype], 5e-2) if kv_dtype else ERRORS[dtype])
    if dtype == "float32" and kv_dtype is None:
        assert answer == exact[149:-1].argmax(-1).tolist()
