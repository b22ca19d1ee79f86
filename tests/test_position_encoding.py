"""xPos and the attention window in configs, checkpoints, the model and the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, HrmTextForCausalLM

from hrmcore.checkpoint import read_config, save_model
from hrmcore.config import HRMConfig
from hrmcore.data import PackedBatch
from hrmcore.model import HRM
from hrmcore.ops.backend import reference_ops
from hrmcore.runner import TorchRunner

pytestmark = pytest.mark.usefixtures("one_thread")


def config(**changes: Any) -> HRMConfig:
    values: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_layers_per_stack": 1,
        "num_attention_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 64,
        "position_encoding": "xpos",
    }
    return HRMConfig(**values | changes)


def random_model(own: HRMConfig) -> HRM:
    """Weights larger than the initialisation's, so that attention is not nearly uniform."""
    torch.manual_seed(0)
    model = HRM(own)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(2.0 if "gqkv" in name else 1.0)
    return model.eval()


def some_ids(count: int) -> list[int]:
    return torch.randint(61, (count,), generator=torch.Generator().manual_seed(count)).tolist()


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


FORMS = [config(), config(attention_window=64), config(position_encoding="rope", attention_window=64)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_encoding": "alibi"}, "position_encoding must be 'rope' or 'xpos', got 'alibi'"),
        ({"position_encoding": None}, "position_encoding must be of type str"),
        ({"xpos_scale_base": 63}, "xpos_scale_base must be from 64 to 1048576, got 63"),
        ({"xpos_scale_base": 512.0}, "xpos_scale_base must be of type int"),
        ({"position_encoding": "rope", "xpos_scale_base": 100}, "xpos_scale_base is for position_encoding 'xpos'"),
        ({"attention_window": 100}, "attention_window must be a multiple of 64, or 0 for none, got 100"),
        ({"attention_window": -64}, "attention_window must be a multiple of 64, or 0 for none, got -64"),
    ],
)
def test_bad_config(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_an_xpos_model_has_no_wall_at_its_training_length() -> None:
    assert config().context == 65536
    assert config(max_position_embeddings=100_000).context == 100_000
    assert config(position_encoding="rope").context == 64
    model = random_model(config())
    assert model(torch.tensor([some_ids(150)])).isfinite().all()
    with pytest.raises(ValueError, match="ids has 65537 tokens, the context of an xPos model is 65536"):
        model(torch.zeros(1, 65537, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ids has 65 tokens, the context \(max_position_embeddings\) is 64"):
        random_model(config(position_encoding="rope"))(torch.zeros(1, 65, dtype=torch.int64))


def test_a_rope_model_writes_no_new_key(tmp_path: Path) -> None:
    random_model(config(position_encoding="rope")).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not {"position_encoding", "xpos_scale_base", "attention_window", "rope_parameters"} & written.keys()


@pytest.mark.parametrize("own", [*FORMS, config(xpos_scale_base=256)])
def test_export_is_refused_unless_asked_for_by_name(own: HRMConfig, tmp_path: Path) -> None:
    model = random_model(own)
    with pytest.raises(ValueError, match="would compute another model from these weights; allow_xpos=True writes"):
        model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    model.save_pretrained(tmp_path / "own", allow_xpos=True)
    again = HRM.from_pretrained(tmp_path / "own")
    assert again.config == own
    ids = torch.tensor([some_ids(64)])
    assert torch.equal(again(ids, 20), model(ids, 20))
    for reader in (HrmTextForCausalLM, AutoModelForCausalLM):
        with pytest.raises(KeyError, match="hrmcore"):
            reader.from_pretrained(tmp_path / "own")


def test_a_foreign_rope_type_is_still_refused(tmp_path: Path) -> None:
    save_model(random_model(config(position_encoding="rope")), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for changes in ({"rope_parameters": {"rope_type": "hrmcore"}}, {"position_encoding": "alibi"}):
        (tmp_path / "config.json").write_text(json.dumps(written | changes))
        with pytest.raises(ValueError, match="hrmcore supports only"):
            read_config(tmp_path)


@pytest.mark.parametrize("own", FORMS)
def test_logits_and_gradients_equal_the_references(own: HRMConfig) -> None:
    own = own.replace(max_position_embeddings=256)
    generator = torch.Generator().manual_seed(5)
    supervised = torch.arange(40, 210)
    batch = PackedBatch(
        ids=torch.randint(61, (230,), generator=generator),
        offsets=torch.tensor([0, 30, 230], dtype=torch.int32),
        prefix=torch.tensor([30, 150], dtype=torch.int32),
        positions=torch.cat([torch.arange(30), torch.arange(200)]).int(),
        supervised=supervised,
        targets=torch.randint(61, (len(supervised),), generator=generator),
        records=(0, 1),
    )
    gradients = []
    for references in (False, True):
        model = random_model(own)
        if references:
            with reference_ops():
                model.loss(batch, horizon=5).backward()
        else:
            model.loss(batch, horizon=5).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours is not None
        assert theirs is not None
        assert relative(ours, theirs) <= 1e-4


@torch.no_grad()
def test_each_form_is_another_model() -> None:
    """Guards the comparisons of this file: with forms that do nothing, they would hold as well."""
    ids = torch.tensor([some_ids(200)])
    forms = [own.replace(max_position_embeddings=256) for own in (*FORMS, config(position_encoding="rope"))]
    logits = [random_model(own)(ids, 100) for own in forms]
    for i, ours in enumerate(logits):
        assert all(relative(ours, other) > 1e-3 for other in logits[:i])


@torch.no_grad()
@pytest.mark.parametrize("own", FORMS)
def test_the_reference_runner_continues_as_the_model(own: HRMConfig) -> None:
    own = own.replace(max_position_embeddings=256)
    model, ids = random_model(own), some_ids(230)
    runner = TorchRunner(model)
    (handle,), first = runner.open([ids[:140]], [130])
    rows = [first, *(runner.step([handle], [token]) for token in ids[140:])]
    assert relative(torch.cat([torch.as_tensor(row) for row in rows]), model(torch.tensor([ids]), 130)[0, 139:]) <= 1e-5
