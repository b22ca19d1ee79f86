"""xPos and the attention window in configs, checkpoints, the model and the engine."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, HrmTextForCausalLM

import hrmcore
from hrmcore import _C
from hrmcore.checkpoint.hrm_text import read_config, save_model
from hrmcore.config import HRMConfig
from hrmcore.data.packing import PackedBatch
from hrmcore.engine.cpu_runner import CpuRunner, convert, log_decay, rotations
from hrmcore.engine.torch_runner import TorchRunner
from hrmcore.model import HRM
from hrmcore.ops.backend import reference_ops
from hrmcore.ops.rope import rope_table, xpos_log_decay

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]


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
        ({"xpos_scale_base": 63}, "xpos_scale_base must be at least 64, got 63"),
        ({"xpos_scale_base": 512.0}, "xpos_scale_base must be of type int"),
        ({"position_encoding": "rope", "xpos_scale_base": 100}, "xpos_scale_base is for position_encoding 'xpos'"),
        ({"attention_window": 100}, "attention_window must be a multiple of 64, or 0 for none, got 100"),
        ({"attention_window": -64}, "attention_window must be at least 0, got -64"),
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


LONG = config(max_position_embeddings=512, vocab_size=67, head_dim=40, H_cycles=1, L_cycles=2)
# The scale bases make spans of two blocks and of four (csrc/kv/paged_attention.h): the prefix crosses the first.
LONG_FORMS = [
    LONG.replace(xpos_scale_base=256),
    LONG.replace(attention_window=64),
    LONG.replace(position_encoding="rope", attention_window=128),
]
PROMPT, LENGTH = 150, 270  # the prefix is longer than two windows of 64, and so is the response


@functools.cache
def long_case(form: int) -> tuple[HRM, list[int], Tensor]:
    model = random_model(LONG_FORMS[form])
    ids = torch.randint(67, (LENGTH,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.no_grad():
        return model, ids, model(torch.tensor([ids]), PROMPT)[0]


def runner_of(model: HRM, folder: Path, dtype: str = "float32", kv_dtype: str | None = None) -> CpuRunner:
    if not folder.exists():
        save_model(model, folder, allow_xpos=True)
    return CpuRunner.from_checkpoint(folder, dtype, kv_dtype, 1, 1 << 20)


@pytest.mark.parametrize("form", range(len(LONG_FORMS)))
def test_the_engine_computes_what_the_model_does(isa: str, form: int, tmp_path: Path) -> None:
    model, ids, expected = long_case(form)
    runner = runner_of(model, tmp_path / "m")
    assert relative(torch.as_tensor(runner.logits(ids, PROMPT)), expected) <= 1e-5
    (handle,), first = runner.open([ids[:PROMPT]], [PROMPT])
    rows = [first, *(runner.step([handle], [token]) for token in ids[PROMPT:])]
    assert relative(torch.cat([torch.as_tensor(row) for row in rows]), expected[PROMPT - 1 :]) <= 1e-5


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("form", range(len(LONG_FORMS)))
def test_a_rounded_cache_stays_close(isa: str, form: int, kv_dtype: str, tmp_path: Path) -> None:
    model, ids, expected = long_case(form)
    logits = torch.as_tensor(runner_of(model, tmp_path / "m", "float32", kv_dtype).logits(ids, PROMPT))
    assert 1e-4 < relative(logits, expected) < {"bfloat16": 2e-2, "int8": 8e-2}[kv_dtype]


@pytest.mark.skipif("bf16" not in _C.supported_isas(), reason="the processor has no products in bfloat16")
@pytest.mark.parametrize("isa", [isa for isa in ("bf16", "amx") if isa in _C.supported_isas()], indirect=True)
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("window", [0, 64, 128])
@pytest.mark.parametrize("scale_base", [64, 256, 1024])  # spans of one block, two and eight
def test_a_prefix_attends_alike_in_tiles(isa: str, scale_base: int, window: int, kv_dtype: str, tmp_path: Path) -> None:
    model = random_model(LONG.replace(xpos_scale_base=scale_base, attention_window=window))
    runner = runner_of(model, tmp_path / "m", "bfloat16", kv_dtype)
    for prefix in (1, 17, 64, 131, 300, 511):
        ids = torch.randint(67, (prefix,), generator=torch.Generator().manual_seed(3)).tolist()
        rows = {}
        for name in ("vnni", isa):
            _C.set_isa(name)
            rows[name] = torch.as_tensor(runner.logits(ids, prefix))
        assert 0 < relative(rows[isa], rows["vnni"]) < {"bfloat16": 6e-3, "int8": 1.5e-2}[kv_dtype]


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "int8")])
@pytest.mark.parametrize("form", range(len(LONG_FORMS)))
def test_bits_do_not_depend_on_chunks_or_company(
    isa: str, form: int, dtype: str, kv_dtype: str, tmp_path: Path
) -> None:
    model, ids, _ = long_case(form)
    runner = runner_of(model, tmp_path / "m", dtype, kv_dtype)
    whole = runner.logits(ids, PROMPT)
    (handle, other), first = runner.open([ids[:PROMPT], ids[:70]], [PROMPT, 3])
    assert np.array_equal(first[0], whole[PROMPT - 1])
    position = PROMPT
    for size in (1, 13, 1, 40, 2, 63):
        logits = np.empty((2, 67), np.float32)
        runner.core.step([other, handle], [[5], ids[position : position + size]], logits, False)
        position += size
        assert np.array_equal(logits[1], whole[position - 1])


def test_blocks_behind_the_window_are_given_back(tmp_path: Path) -> None:
    model, ids, _ = long_case(1)
    runner = runner_of(model, tmp_path / "m")
    (handle,), _ = runner.open([ids[:PROMPT]], [PROMPT])
    used = []
    for token in ids[PROMPT:]:
        runner.step([handle], [token])
        used.append(runner.core.cache_pages_used)
    assert max(used) == 2
    runner.close(handle)
    assert runner.core.cache_pages_used == 0


def test_load_takes_a_window_and_long_inputs(tmp_path: Path) -> None:
    model = random_model(config())
    model.save_pretrained(tmp_path / "m", allow_xpos=True)
    ids = some_ids(300)
    with torch.no_grad():
        windowed = HRM(config(attention_window=64))
        windowed.load_state_dict(model.state_dict())
        for window, same in ((None, model), (64, windowed)):
            engine = hrmcore.load(tmp_path / "m", attention_window=window)
            assert engine.config.attention_window == (window or 0)
            assert relative(torch.as_tensor(engine.logits(ids, 100)), same(torch.tensor([ids]), 100)[0]) <= 1e-5
    assert len(list(engine.tokens(ids, max_new_tokens=5, ignore_eos=True))) == 5
    with pytest.raises(ValueError, match="attention_window must be a multiple of 64, 0 or None, got 65"):
        hrmcore.load(tmp_path / "m", attention_window=65)


def test_a_packed_file_keeps_the_encoding(tmp_path: Path) -> None:
    model, ids, expected = long_case(1)
    save_model(model, tmp_path / "m", allow_xpos=True)
    convert(tmp_path / "m", tmp_path / "packed", "float32")
    engine = hrmcore.load(tmp_path / "packed")
    assert engine.config == LONG_FORMS[1]
    assert relative(torch.as_tensor(engine.logits(ids, PROMPT)), expected) <= 1e-5


def test_the_engine_has_the_tables_of_the_ops() -> None:
    own = config(head_dim=64, xpos_scale_base=300)
    decay = log_decay(own)
    assert decay is not None
    assert np.allclose(decay, xpos_log_decay(64, 300).numpy(), rtol=1e-7, atol=0)
    assert np.abs(rotations(own)[::97] - rope_table(65536, 64, exact=True).numpy()[::97]).max() <= 1e-7
    assert log_decay(config(position_encoding="rope")) is None
