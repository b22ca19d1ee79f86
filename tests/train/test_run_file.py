"""The keys of a run file: their ranges, what --explain says, what --set changes."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch
from support.runs import rewrite

from hrmcore.cli import main
from hrmcore.commands.plot import read_metrics
from hrmcore.config import HRMConfig, LoraConfig
from hrmcore.growth.stages import GrowStage
from hrmcore.train.explanation import GROUPS, explain
from hrmcore.train.run_file import (
    RANGES,
    TrainConfig,
    read_config,
)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 12", "steps = 0", "steps must be at least 1, got 0"),
        ("steps = 12", "stepz = 12", "unknown key 'stepz'"),
        ("steps = 12", "", "missing key 'steps'"),
        ("steps = 12", 'steps = "many"', "steps must be of type int, got 'many'"),
        ("steps = 12", "steps = ", "not TOML"),
        ("learning_rate = 0.003", "learning_rate = -1", "learning_rate must be above 0"),
        ("seed = 7", 'schedule = "triangle"', "schedule must be one of"),
        ("seed = 7", 'optimizer = "sgd"', "optimizer must be one of"),
        ("seed = 7", 'precision = "half"', "precision must be one of"),
        (
            "seed = 7",
            'precision = "float8"',
            "'float8' is not offered: no GPU has measured what it gains; set precision = 'bfloat16'$",
        ),
        ("seed = 7", 'optimizer = "adamw"\nrho = 0.1', "rho means nothing to adamw; remove it"),
        ("seed = 7", "betas = [0.9]", r"betas must be of type tuple\[float, float\]"),
        ("seed = 7", "ema = 1.0", "ema must be at least 0 and below 1"),
        ("seed = 7", "accumulate = 0", "accumulate must be at least 1"),
        ("seed = 7", 'on_nonfinite = "hope"', "on_nonfinite must be one of"),
        ("seed = 7", "horizon_first = 1", "horizon_first must be at least 2"),
        ("seed = 7", "horizon_first = 9", "horizons must satisfy horizon_first <= horizon_last, got 9 and 5"),
        (
            "seed = 7",
            f"check_records = {1 << 63}",
            "check_records must be at most 2147483647 .*, got 9",
        ),
        ("seed = 7", "seed = -1", "seed must be at least 0, got -1"),
        ("seed = 7", f"accumulate = {1 << 62}", "accumulate must be at most 1048576"),
        ("seed = 7", "betas = [0.9, nan]", "betas must be at most .*, got nan"),
        ("seed = 7", "betas = [1.0, 0.9]", "betas must be at most"),
        ("seed = 7", "weight_decay = nan", "weight_decay must be at most"),
        ("learning_rate = 0.003", f"learning_rate = {10**400}", "learning_rate must be at most 1000000.0 .*, got inf"),
        ("learning_rate = 0.003", "learning_rate = nan", "learning_rate must be at most"),
        ("seed = 7", f"keep = {'[' * 5000}", "not TOML"),
        (
            "hidden_size = 32",
            "hidden_size = 32\nvocab_size = 7",
            "model: vocab_size is 7, but .* has 330",
        ),
        ("hidden_size = 32", f"hidden_size = 32\nH_cycles = {1 << 61}", "config: H_cycles must be at most 65536"),
        ("hidden_size = 32", "hidden_sise = 32", "unknown key 'hidden_sise'"),
        ("head_dim = 16", "head_dim = 13", "head_dim must be a multiple of 8"),
    ],
)
def test_a_bad_run_file_names_file_and_key(run_file: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{run_file}: .*{message}"):
        read_config(rewrite(run_file, old, new))


def test_every_number_of_a_run_file_has_a_range() -> None:
    kinds = ("int", "float", "tuple[float, float]")
    numbers = {f.name for f in dataclasses.fields(TrainConfig) if str(f.type).removesuffix(" | None") in kinds}
    assert numbers == set(RANGES)


def test_an_older_torch_is_named_where_a_run_is_to_be_sharded(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the first state, after hours."""
    name = "torch.distributed.checkpoint.hf_storage"
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    monkeypatch.delattr(name, raising=False)
    read_config(run_file)
    with pytest.raises(
        ValueError, match=f"^{run_file}: sharded training needs torch 2.9 .*{re.escape(torch.__version__)}"
    ):
        read_config(rewrite(run_file, "seed = 7", 'seed = 7\nparallel = "sharded"'))


def test_explain_says_what_every_key_means() -> None:
    lines = explain().splitlines()
    assert max(map(len, lines)) <= 120
    heads = ("[model]", "[[grow]]", "[lora]")
    model, grow, lora = (next(i for i, line in enumerate(lines) if line.startswith(head)) for head in heads)
    tables = (
        *((TrainConfig, lines[:model]), (HRMConfig, lines[model:grow])),
        *((GrowStage, lines[grow:lora]), (LoraConfig, lines[lora:])),
    )
    for table, told in tables:
        for f in dataclasses.fields(table):
            if f.name not in ("model", "vocab_size", "eos_token_id", "pad_token_id"):
                first = next(number for number, line in enumerate(told) if line.startswith(f"  {f.name} "))
                key, kind, *rest = " ".join(line.strip() for line in told[first : first + 4]).split()
                assert key == f.name
                assert kind in ("string", "integer", "number", "true", "[string,", "[number,", "tables", "table"), (
                    f.name
                )
                assert " ".join(f.metadata["explain"].split()) in " ".join(rest), f.name
                if f.default is dataclasses.MISSING:
                    assert " required " in told[first], f.name


def test_explain_groups_the_keys_and_begins_with_those_that_must_be_there() -> None:
    headings = [line for line in explain().splitlines() if line in GROUPS]
    assert headings == list(GROUPS)
    for f in dataclasses.fields(TrainConfig):
        if f.name != "model":
            assert (f.metadata["group"] == "required") == (f.default is dataclasses.MISSING), f.name
            assert f.metadata["group"] in GROUPS


def test_set_stands_for_what_the_run_file_says(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["learning_rate = 2e-3", "betas=[0.8, 0.9]", "optimizer=adamw", "model.rope_theta=500.0", "steps=2"]
    config = read_config(run_file, changes)
    assert (config.learning_rate, config.betas, config.optimizer) == (2e-3, (0.8, 0.9), "adamw")
    assert config.model.rope_theta == 500.0
    given = [word for change in [*changes, f"out={tmp_path / 'other'}"] for word in ("--set", change)]
    assert main(["train", str(run_file), *given]) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "other" / "metrics.jsonl")] == [1, 2]
    capsys.readouterr()
    for change, message in {
        "steps": "--set must be KEY=VALUE, got 'steps'",
        "stepz=3": f"{run_file}: unknown key 'stepz'",
        "steps=many": f"{run_file}: steps must be of type int, got 'many'",
        "model=3": "--set model: name one key, as learning_rate or model.head_dim",
    }.items():
        assert main(["train", str(run_file), "--set", change]) == 2
        assert message in capsys.readouterr().err
