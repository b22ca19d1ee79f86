"""Checkpoints: round trips in every form, transformers as the oracle, and everything that can be broken in a file."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from support.checkpoints import CONFIG, edit_config, edit_tensors, shard, split_form
from torch import Tensor
from transformers import AutoModelForCausalLM, HrmTextForCausalLM

from hrmcore.checkpoint.hrm_text import key_table, load_model, read_config, read_tensors, resolve, save_model
from hrmcore.model import HRM
from hrmcore.tokenizer import Tokenizer, train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(24).view(2, 12) % 50


@torch.no_grad()
def logits(model: HRM) -> Tensor:
    return model(IDS, prefix_length=5)


@torch.no_grad()
def their_logits(model: HrmTextForCausalLM) -> Tensor:
    kinds = (torch.arange(IDS.shape[1]) < 5).long().expand_as(IDS)
    return model.eval()(input_ids=IDS, token_type_ids=kinds).logits


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def same_state(first: HRM, second: HRM) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Round trips


def test_what_is_saved_loads_the_same(model: HRM, folder: Path) -> None:
    loaded = load_model(folder)
    assert loaded.config == CONFIG
    assert same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in loaded.parameters())


def test_the_methods_of_the_model_do_the_same(model: HRM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    assert same_state(HRM.from_pretrained(tmp_path / "saved"), model)


def test_the_split_form_loads_the_same(model: HRM, folder: Path) -> None:
    edit_tensors(folder, split_form)
    keys = set(load_file(folder / "model.safetensors"))
    assert "model.H_module.layers.1.self_attn.gate_proj.weight" in keys
    assert not any("gqkv" in key or "gate_up" in key for key in keys)
    assert same_state(load_model(folder), model)


@pytest.mark.parametrize("split", [False, True])
def test_shards_load_the_same(model: HRM, folder: Path, split: bool) -> None:
    if split:
        edit_tensors(folder, split_form)
    shard(folder)
    assert same_state(load_model(folder), model)


def test_both_spellings_of_depth(folder: Path) -> None:
    inflated = CONFIG.cache_slots
    edit_config(folder, num_layers_per_stack=2, num_hidden_layers=inflated)
    assert read_config(folder) == CONFIG
    edit_config(folder, num_layers_per_stack=None, num_hidden_layers=2)
    assert read_config(folder) == CONFIG


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_dtype_is_kept_on_disk_and_read_as_float32(model: HRM, tmp_path: Path, dtype: torch.dtype) -> None:
    save_model(model, tmp_path, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert {tensor.dtype for tensor in read_tensors(tmp_path).values()} == {dtype}
    for name, value in load_model(tmp_path).state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.state_dict()[name].to(dtype).float())


def test_the_key_table_is_two_way(model: HRM, folder: Path) -> None:
    keys = list(key_table(CONFIG))
    state = model.state_dict()
    assert [key.name for key in keys] == list(state) or {key.name for key in keys} == set(state)
    assert all(key.shape == tuple(state[key.name].shape) for key in keys)
    assert {key.released for key in keys} == set(load_file(folder / "model.safetensors"))
    on_disk = [name for key in keys for name in {key.released, *key.split}]
    assert len(on_disk) == len(set(on_disk))


def test_loading_touches_no_random_numbers(folder: Path) -> None:
    before = torch.random.get_rng_state()
    load_model(folder)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_saving_over_an_open_checkpoint(model: HRM, folder: Path) -> None:
    """The old file stays whole for those who have it mapped."""
    tensors = read_tensors(folder)
    before = tensors["lm_head.weight"].clone()
    other = HRM(CONFIG)
    save_model(other, folder)
    assert torch.equal(tensors["lm_head.weight"], before)
    assert same_state(load_model(folder), other)
    assert not same_state(other, model)


# transformers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_what_is_saved(model: HRM, tmp_path: Path, dtype: torch.dtype) -> None:
    save_model(model, tmp_path, dtype=dtype)
    theirs, report = HrmTextForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report
    assert relative(logits(load_model(tmp_path)), their_logits(theirs)) <= 1e-5
    assert theirs.config.eos_token_id == [4, 7]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype


@pytest.mark.parametrize("changes", [{"prefix_lm": False}, {"eos_token_id": None, "pad_token_id": None, "H_cycles": 1}])
def test_transformers_reads_the_same_configuration(tmp_path: Path, changes: dict[str, Any]) -> None:
    ours = HRM(CONFIG.replace(**changes))
    save_model(ours, tmp_path)
    theirs = HrmTextForCausalLM.from_pretrained(tmp_path)
    assert relative(logits(ours), their_logits(theirs)) <= 1e-5


@pytest.mark.parametrize("released", [True, False])
@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
def test_what_transformers_saves_loads_here(model: HRM, tmp_path: Path, released: bool, shard_size: str) -> None:
    """In the released form, and in the split form that it writes when told to keep its own names."""
    save_model(model, tmp_path / "ours")
    theirs = HrmTextForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", save_original_format=released, max_shard_size=shard_size)
    assert (tmp_path / "theirs/model.safetensors").exists() == (shard_size == "5GB")
    loaded = load_model(tmp_path / "theirs")
    assert loaded.config == CONFIG
    assert same_state(loaded, model)
    assert relative(logits(loaded), their_logits(theirs)) <= 1e-5


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    "edit",
    [
        lambda tensors: None,
        lambda tensors: tensors.pop(HEAD),
        lambda tensors: tensors.pop(EMBEDDING),
        lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}),
        lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.ones(16)}),
        lambda tensors: tensors.update({"model.L_module.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}),
    ],
    ids=["both stored", "no head", "no embedding", "equal", "inv_freq", "inv_freq of a layer"],
)
@pytest.mark.parametrize("split", [False, True])
def test_what_transformers_loads_as_tied_loads_here(folder: Path, edit: Any, split: bool) -> None:
    edit_config(folder, tie_word_embeddings=True)
    edit_tensors(folder, edit)
    if split:
        shard(folder)
    theirs, report = HrmTextForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    ours = load_model(folder)
    assert relative(logits(ours), their_logits(theirs)) <= 1e-5
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    assert torch.equal(ours.embed_tokens.weight, theirs.get_input_embeddings().weight)
    save_model(ours, folder.with_name("again"))
    assert same_state(load_model(folder.with_name("again")), ours)


def test_only_tied_matrices_may_be_missing(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(HEAD))
    with pytest.raises(ValueError, match=r"tensor 'lm_head\.weight' is missing"):
        load_model(folder)


# The configuration


def test_keys_that_do_not_touch_the_computation_are_ignored(folder: Path) -> None:
    edit_config(folder, attention_dropout=0.1, use_cache=False, L_bp_cycles=[2], transformers_version="9", nonsense=[1])
    assert read_config(folder) == CONFIG


def test_what_a_released_config_leaves_out(folder: Path) -> None:
    """transformers' defaults, which are not HRMConfig's."""
    left_out = (
        "embedding_scale",
        "initializer_range",
        "max_position_embeddings",
        "rope_theta",
        "prefix_lm",
        "head_dim",
    )
    edit_config(folder, remove=(*left_out, "H_cycles", "L_cycles", "rms_norm_eps", "pad_token_id", "eos_token_id"))
    config = read_config(folder)
    assert (config.max_position_embeddings, config.rope_theta, config.prefix_lm) == (2048, 10000.0, True)
    assert (config.H_cycles, config.L_cycles, config.rms_norm_eps, config.head_dim) == (2, 3, 1e-6, 128)
    assert (config.embedding_scale, config.pad_token_id, config.eos_token_ids) == (50.0, None, ())


def test_a_null_embedding_scale_is_the_inverse_of_the_initializer_range(folder: Path) -> None:
    edit_config(folder, embedding_scale=None, initializer_range=0.125)
    assert read_config(folder).embedding_scale == 8.0


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({"rope_theta": 700.0}, 700.0),
        ({"rope_theta": 1.5, "rope_parameters": {"rope_type": "default", "rope_theta": 600.0}}, 600.0),
        ({"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}, "rope_scaling": None}, 500.0),
        ({"rope_theta": 500.0, "rope_scaling": {"type": "default"}}, 500.0),
    ],
)
def test_where_rope_theta_comes_from(folder: Path, changes: dict[str, Any], theta: float) -> None:
    edit_config(folder, **changes)
    assert read_config(folder).rope_theta == theta
    assert HrmTextForCausalLM.from_pretrained(folder).config.rope_parameters["rope_theta"] == theta


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("model_type", wrong) for wrong in ("llama", None, 3)],
        *[("hidden_act", wrong) for wrong in ("gelu", None)],
        *[(key, wrong) for key in ("attention_bias", "mlp_bias") for wrong in (True, 1, "yes")],
        *[("tie_word_embeddings", wrong) for wrong in (1, "yes")],
        *[("rope_scaling", wrong) for wrong in ({"type": "linear", "factor": 2.0}, {"rope_type": "yarn"}, "linear", 2)],
        *[("rope_parameters", wrong) for wrong in ({"rope_type": "dynamic", "rope_theta": 1e4}, [1], True)],
        ("quantization_config", {"bits": 4}),
        ("position_encoding", "alibi"),
        *[("num_hidden_layers", wrong) for wrong in (None, 0, "2", 2.0)],
        *[("vocab_size", wrong) for wrong in (None, 0, -1, 1e9, [50])],
        *[("head_dim", wrong) for wrong in (None, 7)],
        ("num_attention_heads", 5),
        ("max_position_embeddings", 1 << 40),
        ("prefix_lm", None),
        ("eos_token_id", [4, 50]),
        ("rope_theta", float("nan")),
    ],
)
def test_a_configuration_that_is_not_supported_is_named(folder: Path, key: str, value: object) -> None:
    edit_config(folder, **{key: value})
    with pytest.raises(ValueError, match=rf"{folder}/config\.json: .*{key}"):
        load_model(folder)


@pytest.mark.parametrize("value", [0, 2.0, -0.02, "0.02", True, float("nan")])
def test_an_impossible_initializer_range(folder: Path, value: object) -> None:
    edit_config(folder, embedding_scale=None, initializer_range=value)
    with pytest.raises(ValueError, match=r"config\.json: initializer_range must be"):
        read_config(folder)


# Lazy tensors


def test_tensors_are_views_of_the_mapped_file(folder: Path) -> None:
    tensors = read_tensors(folder)
    assert len(tensors) == len(list(tensors)) == 3 + 2 * 2 * 4
    first, second = tensors["lm_head.weight"], tensors["lm_head.weight"]
    assert first.data_ptr() == second.data_ptr()
    with pytest.raises(KeyError):
        tensors["model.lm_head.weight"]


def test_tensors_are_aligned_whatever_the_header(folder: Path, model: HRM) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    for padding in range(1, 5):
        header = content[8 : 8 + length] + b" " * padding
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
        for name, tensor in read_tensors(folder).items():
            assert tensor.data_ptr() % tensor.element_size() == 0
            assert torch.equal(tensor, model.state_dict()[name])


# Writing


def test_a_failed_write_leaves_the_old_checkpoint(model: HRM, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_model(HRM(CONFIG), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_files_are_whole_before_they_have_their_names(
    model: HRM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    renamed: list[str] = []
    sync, rename = os.fsync, os.replace

    def watch_sync(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def watch_rename(source: Path, target: Path) -> None:
        assert source.parent == target.parent
        assert source.name in synced
        renamed.append(target.name)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watch_sync)
    monkeypatch.setattr(os, "replace", watch_rename)
    save_model(model, tmp_path)
    assert set(renamed) >= {"config.json", "model.safetensors"}
    assert synced[-1] == tmp_path.name  # the folder, after the renames
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_files_have_the_permissions_that_others_have(folder: Path) -> None:
    (folder / "plain").touch()
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_the_tokenizer_comes_along(model: HRM, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(
        ["How many times does 12 + 45 appear in hello world\n"] * 50, tmp_path / "tokenizer", 300
    )
    (tmp_path / "tokenizer/notes.txt").write_text("not the tokenizer's")
    save_model(model, tmp_path / "saved", tokenizer_folder=tmp_path / "tokenizer")
    assert Tokenizer.load(tmp_path / "saved").encode("12 + 45") == tokenizer.encode("12 + 45")
    names = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.model"]


def test_refusals_to_write(model: HRM, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype must be float32, bfloat16 or float16, got torch\.int8"):
        save_model(model, tmp_path / "new", dtype=torch.int8)
    with pytest.raises(FileNotFoundError, match=r"empty: no tokenizer\.model and no tokenizer\.json"):
        save_model(model, tmp_path / "new", tokenizer_folder=tmp_path / "empty")
    large = HRM(CONFIG)
    large.lm_head.weight.data[3, 4] = 1e6
    with pytest.raises(ValueError, match=r"lm_head\.weight does not fit torch\.float16: its largest value is 1e\+06"):
        save_model(large, tmp_path / "new", dtype=torch.float16)
    assert not (tmp_path / "new").exists()
    shard(folder)
    with pytest.raises(ValueError, match="holds a sharded checkpoint"):
        save_model(model, folder)


# Where a checkpoint is


def test_resolve_local_folders_and_what_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(folder) == resolve(str(folder)) == folder
    with pytest.raises(ValueError, match="a checkpoint is a folder with"):
        resolve(folder / "config.json")
    for missing in (folder / "gone", "/no/such/folder", "../gone", "gone", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            resolve(missing)
    run = folder.rename(folder.parent / "checkpoint").parent
    with pytest.raises(FileNotFoundError, match=rf"^{run}: a run folder; its model is {run}/checkpoint$"):
        resolve(run)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        resolve("owner/name")


def test_resolve_hub_ids_from_the_local_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache as huggingface_hub lays it out: a snapshot of links into blobs; no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError, match=r"owner/name\.v1: no such folder, and not in the local Hugging Face"):
        resolve("owner/name.v1")
    repository = tmp_path / "hub/models--owner--name.v1"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("c" * 40)
    snapshot = repository / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    for blob in folder.rename(repository / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    assert resolve("owner/name.v1") == snapshot
    assert load_model("owner/name.v1").config == CONFIG
