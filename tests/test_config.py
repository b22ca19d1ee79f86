"""HRMConfig: what it accepts, what it refuses and how it says so."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import pytest

from hrmcore.checkpoint.hrm_text import key_table
from hrmcore.config import MAX_POSITIONS, PRESETS, RANGES, HRMConfig, default_intermediate_size

SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_layers_per_stack": 2,
    "num_attention_heads": 3,
}


def test_defaults_are_those_of_the_paper() -> None:
    config = HRMConfig(**SMALL)
    assert (config.H_cycles, config.L_cycles, config.head_dim) == (2, 3, 128)
    assert (config.rms_norm_eps, config.rope_theta, config.prefix_lm) == (1e-6, 10000.0, True)
    assert config.embedding_scale == math.sqrt(48)
    assert (config.attention_width, config.visits, config.cache_slots) == (384, 8, 16)


@pytest.mark.parametrize(
    ("size", "layers", "width", "heads", "ffn"),
    [("B", 6, 1024, 8, 2816), ("L", 12, 1280, 10, 3584), ("XL", 16, 1536, 12, 4096), ("XXL", 36, 1792, 14, 4864)],
)
def test_published_sizes(size: str, layers: int, width: int, heads: int, ffn: int) -> None:
    config = HRMConfig.preset(size)
    assert (config.num_layers_per_stack, config.hidden_size, config.num_attention_heads) == (layers, width, heads)
    assert (config.intermediate_size, config.head_dim, config.vocab_size) == (ffn, 128, 65536)
    assert default_intermediate_size(width) == ffn


def test_xl_has_the_released_models_size_and_cache() -> None:
    config = HRMConfig.preset("XL")
    block = config.hidden_size * (5 * config.attention_width + 3 * config.intermediate_size)
    parameters = 2 * config.num_layers_per_stack * block + 2 * config.vocab_size * config.hidden_size
    assert parameters == 1_182_793_728  # HRM-Text-1B
    assert config.cache_slots == 128
    assert config.cache_slots * 2 * config.attention_width * 2 == 786_432  # bytes a token in bfloat16


def test_unknown_size() -> None:
    with pytest.raises(ValueError, match="unknown size 'M'; the sizes are B, L, XL, XXL"):
        HRMConfig.preset("M")
    assert list(PRESETS) == ["B", "L", "XL", "XXL"]


def test_a_dict_comes_back() -> None:
    config = HRMConfig(**SMALL, eos_token_id=(3, 4), pad_token_id=0, embedding_scale=2.5)
    assert HRMConfig.from_dict(config.to_dict()) == config
    assert HRMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_replace_changes_and_validates() -> None:
    assert HRMConfig(**SMALL).replace(L_cycles=1).L_cycles == 1
    with pytest.raises(ValueError, match="L_cycles must be at least 1, got 0"):
        HRMConfig(**SMALL).replace(L_cycles=0)


def test_unknown_and_missing_keys_are_named() -> None:
    with pytest.raises(ValueError, match="unknown key 'hiden_size'; the keys are H_cycles, "):
        HRMConfig.from_dict(SMALL | {"hiden_size": 48})
    for key in SMALL:
        with pytest.raises(ValueError, match=f"missing key '{key}'"):
            HRMConfig.from_dict({name: value for name, value in SMALL.items() if name != key})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(key, wrong) for key in SMALL for wrong in (0, -1, 1.0, "7", None, True, [7], 1 << 70)],
        *[
            (key, wrong)
            for key in ("head_dim", "H_cycles", "L_cycles", "max_position_embeddings")
            for wrong in (0, 2.0)
        ],
        *[("head_dim", wrong) for wrong in (12, 264)],
        *[("num_attention_heads", wrong) for wrong in (5, 49)],
        ("max_position_embeddings", MAX_POSITIONS + 1),
        *[("rms_norm_eps", wrong) for wrong in (0, 1, -1e-6, math.nan, math.inf, "1e-6", 10**400)],
        *[("rope_theta", wrong) for wrong in (0, 1, -10000.0, math.nan, math.inf, None, 10**400)],
        *[("embedding_scale", wrong) for wrong in (0, -1.0, math.nan, math.inf, "sqrt", False, 10**400)],
        *[("embedding_scale", wrong) for wrong in (1e39, 1e-39)],
        *[(key, 1 << 61) for key in ("head_dim", "H_cycles", "L_cycles", "max_position_embeddings", "H_layers")],
        *[("prefix_lm", wrong) for wrong in (0, 1, None, "true")],
        *[("pad_token_id", wrong) for wrong in (-1, 100, 1.0, True, (1,), [1])],
        *[("eos_token_id", wrong) for wrong in (-1, 100, 1.0, True, (1, 100), [1, None], ["1"], [[1]], [True], "1")],
    ],
)
def test_impossible_values_name_the_key(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^config: .*{key}"):
        HRMConfig.from_dict(SMALL | {key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 1 << 24, "num_attention_heads": 1, "vocab_size": 1 << 30}, "make 3.6e.16 weights"),
        ({"num_layers_per_stack": 60000, "intermediate_size": 1 << 24}, "make 2.9e.14 weights; a process can address"),
        (
            {"H_cycles": 65536, "L_cycles": 65536},
            "L_cycles 65536 make 4295032832 visits and .* fewer",
        ),
    ],
)
def test_sizes_that_together_fit_no_memory_are_refused_before_any_is_asked_for(
    changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^config: .*{message}"):
        HRMConfig.from_dict(SMALL | changes)


def test_every_number_of_a_config_has_a_range() -> None:
    numbers = {f.name for f in dataclasses.fields(HRMConfig) if str(f.type).split(" ")[0] in ("int", "float")}
    assert numbers - {"pad_token_id", "eos_token_id"} == set(RANGES)


def test_the_number_of_weights_is_that_of_the_key_table() -> None:
    for config in (HRMConfig(**SMALL), HRMConfig(**SMALL, H_layers=5, head_dim=16), HRMConfig.preset("B")):
        assert config.parameters == sum(math.prod(key.shape) for key in key_table(config))


@pytest.mark.parametrize(("value", "ids"), [(None, ()), (7, (7,)), ([7, 9], (7, 9)), ((0,), (0,)), ([], ())])
def test_end_tokens_are_a_tuple_in_every_case(value: object, ids: tuple[int, ...]) -> None:
    config = HRMConfig.from_dict(SMALL | {"eos_token_id": value})
    assert config.eos_token_ids == ids
    assert hash(config) == hash(config.replace())


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        HRMConfig(**SMALL).hidden_size = 1  # type: ignore[misc]


def test_it_imports_no_torch() -> None:
    code = "import sys, hrmcore.config, hrmcore.tokenizer; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
