"""Everything that can be broken in a checkpoint: one error that names file and key, and never a crash."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import edit_config, edit_tensors, shard, split_form

from hrmcore.checkpoint.hrm_text import load_model, read_tensors, save_model
from hrmcore.model import HRM

# By name: what breaks it, the kind of error, and what the error must say besides the file's name.

LAYER = "model.L_module.layers.1."
BREAKS: dict[str, tuple[Callable[[Path], object], str, tuple[str, ...]]] = {}


def breaks(error: str, *says: str) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    def add(function: Callable[[Path], object]) -> Callable[[Path], object]:
        BREAKS[function.__name__] = (function, error, says)
        return function

    return add


def rewrite_header(folder: Path, edit: Callable[[dict[str, Any]], object], data: bytes = b"") -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :] + data)


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    shard(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


@breaks("ValueError", f"'{LAYER}mlp.down_proj.weight' is missing")
def missing_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(f"{LAYER}mlp.down_proj.weight"))


@breaks("ValueError", f"'{LAYER}self_attn.k_proj.weight' is missing")
def missing_part_of_the_split_form(folder: Path) -> None:
    edit_tensors(folder, split_form)
    edit_tensors(folder, lambda tensors: tensors.pop(f"{LAYER}self_attn.k_proj.weight"))


@breaks("ValueError", "'model.z_L_init' is missing")
def missing_z_init(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("model.z_L_init"))


@breaks("ValueError", "model.safetensors: extra tensor 'model.norm.weight'")
def extra_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(48)}))


@breaks("ValueError", "extra tensor 'model.H_module.layers.0.self_attn.q_proj.weight'")
def one_layer_in_both_forms(folder: Path) -> None:
    extra = {"model.H_module.layers.0.self_attn.q_proj.weight": torch.zeros(64, 48)}
    edit_tensors(folder, lambda tensors: tensors.update(extra))


@breaks("ValueError", "extra tensor 'model.H_module.layers.1.")
def more_layers_than_the_config(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)


@breaks("ValueError", "'model.L_module.layers.2.attn.gqkv_proj.weight' is missing")
def fewer_layers_than_the_config(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=10000)


@breaks("ValueError", "config: num_layers_per_stack must be at most 65536")
def more_layers_than_fit(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1 << 50)


@breaks("ValueError", "config: H_cycles must be at most 65536", "got 2305843009213693952")
def more_cycles_than_can_be_counted(folder: Path) -> None:
    edit_config(folder, H_cycles=1 << 61)


@breaks("ValueError", "config: H_cycles 60000 and L_cycles 60000 make 3600060000 visits", "take fewer cycles")
def more_cycles_than_memory(folder: Path) -> None:
    edit_config(folder, H_cycles=60000, L_cycles=60000)


@breaks("ValueError", "config: embedding_scale must be at most", "got 1e+39")
def embedding_scale_beyond_float32(folder: Path) -> None:
    edit_config(folder, embedding_scale=1e39)


@breaks("ValueError", "'lm_head.weight' has a value that is NaN or infinite")
def weights_that_are_not_finite(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors["lm_head.weight"].view(-1)[-1].fill_(float("nan")))


@breaks("ValueError", "'lm_head.weight' has shape (49, 48)", "asks for (50, 48)")
def misshapen_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(49, 48)}))


@breaks("ValueError", f"'{LAYER}attn.o_proj.weight' has shape (64, 48)")
def transposed_tensor(folder: Path) -> None:
    key = f"{LAYER}attn.o_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({key: tensors[key].T}))


@breaks("ValueError", "'model.z_L_init' has shape (1, 48)")
def tensor_of_another_rank(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.z_L_init": torch.zeros(1, 48)}))


@breaks("ValueError", "self_attn.q_proj.weight' has shape (63, 48)")
def misshapen_part_of_the_split_form(folder: Path) -> None:
    edit_tensors(folder, split_form)
    edit_tensors(folder, lambda tensors: tensors.update({f"{LAYER}self_attn.q_proj.weight": torch.zeros(63, 48)}))


@breaks("ValueError", "'lm_head.weight' has dtype 'F64'", "accepted are F32, BF16, F16")
def float64_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(50, 48).double()}))


@breaks("ValueError", "'lm_head.weight' has dtype 'I8'")
def integer_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(50, 48, dtype=torch.int8)}))


@breaks("ValueError", "dtype ['F32']")
def dtype_that_is_no_text(folder: Path) -> None:
    rewrite_header(folder, lambda header: header["lm_head.weight"].update(dtype=["F32"]))


@breaks("ValueError", "model.safetensors: truncated", "data")
def truncated_data(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


@breaks("ValueError", "model.safetensors: truncated", "header")
def truncated_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


@breaks("ValueError", "model.safetensors: truncated", "header")
def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


@breaks("ValueError", "model.safetensors: truncated", "header")
def header_length_of_the_whole_address_space(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


@breaks("ValueError", "model.safetensors: header of 100000001 bytes")
def header_of_an_absurd_length(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)


@breaks("ValueError", "model.safetensors: not valid JSON")
def header_that_is_not_json(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"\xff\xfenonsens" + bytes(64))


@breaks("ValueError", "model.safetensors: not valid JSON")
def header_nested_without_end(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1_000_000) + b'{"a":' * 200_000 + bytes(64))


@breaks("ValueError", "model.safetensors: must hold a JSON object, got list")
def header_that_is_a_list(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")


@breaks("ValueError", "model.safetensors: not valid JSON", "'a' comes twice")
def header_that_names_a_tensor_twice(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 14) + b'{"a":{},"a":1}')


@breaks("ValueError", "header entry 'lm_head.weight' must be an object")
def entry_that_is_no_object(folder: Path) -> None:
    rewrite_header(folder, lambda header: header.update({"lm_head.weight": [0, 1]}))


@breaks("ValueError", "header entry 'lm_head.weight' must be an object with")
def entry_without_shape(folder: Path) -> None:
    rewrite_header(folder, lambda header: header["lm_head.weight"].pop("shape"))


def offsets(header: dict[str, Any], shift: int) -> list[int]:
    return [offset + shift for offset in header["model.z_L_init"]["data_offsets"]]


@breaks("ValueError", "overlaps another")
def tensors_that_overlap(folder: Path) -> None:
    rewrite_header(folder, lambda header: header["model.z_L_init"].update(data_offsets=offsets(header, -8)))


@breaks("ValueError", "model.safetensors: truncated, tensor 'model.z_L_init' ends at byte")
def offsets_outside_the_file(folder: Path) -> None:
    rewrite_header(folder, lambda header: header["model.z_L_init"].update(data_offsets=offsets(header, 1 << 40)))


@breaks("ValueError", "'model.z_L_init' has impossible shape", "data_offsets [-8, 184]")
def negative_offsets(folder: Path) -> None:
    rewrite_header(folder, lambda header: header["model.z_L_init"].update(data_offsets=[-8, 184]))


@breaks("ValueError", "'model.z_L_init' needs 192 bytes")
def offsets_the_wrong_way_round(folder: Path) -> None:
    rewrite_header(folder, lambda header: header["model.z_L_init"].update(data_offsets=offsets(header, 0)[::-1]))


@breaks("ValueError", "'model.z_L_init' has impossible shape")
def offsets_that_overflow(folder: Path) -> None:
    rewrite_header(folder, lambda header: header["model.z_L_init"].update(data_offsets=[1 << 64, (1 << 64) + 192]))


@breaks("ValueError", "'model.z_L_init' has impossible shape [48.0]")
def shape_of_fractions(folder: Path) -> None:
    rewrite_header(folder, lambda header: header["model.z_L_init"].update(shape=[48.0]))


@breaks("ValueError", "'model.z_L_init' needs ")
def shape_whose_product_overflows(folder: Path) -> None:
    rewrite_header(folder, lambda header: header["model.z_L_init"].update(shape=[1 << 32, 1 << 32, 1 << 32]))


@breaks("ValueError", "'model.z_L_init' has impossible shape")
def three_offsets(folder: Path) -> None:
    rewrite_header(folder, lambda header: header["model.z_L_init"].update(data_offsets=[0, 0, 192]))


@breaks("ValueError", "16 bytes after the last tensor")
def data_of_no_tensor(folder: Path) -> None:
    rewrite_header(folder, lambda header: None, data=bytes(16))


@breaks("ValueError", "leaves a hole before it")
def hole_between_tensors(folder: Path) -> None:
    def shift_all(header: dict[str, Any]) -> None:
        for key, entry in header.items():
            if key != "__metadata__":
                entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]

    rewrite_header(folder, shift_all, data=bytes(4))


@breaks("FileNotFoundError", "config.json: no such file")
def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@breaks("ValueError", "config.json: cannot be read")
def config_that_is_a_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


@breaks("ValueError", "config.json: not valid JSON")
def config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("hidden_size = 48")


@breaks("ValueError", "config.json: not valid JSON")
def config_that_is_not_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\x80\x81\x82")


@breaks("ValueError", "config.json: must hold a JSON object, got list")
def config_that_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


@breaks("ValueError", "config.json: ", "model_type")
def config_with_another_architecture(folder: Path) -> None:
    edit_config(folder, model_type="llama")


@breaks("ValueError", "config.json: missing key 'hidden_size'")
def config_without_a_width(folder: Path) -> None:
    edit_config(folder, remove=("hidden_size",))


@breaks("ValueError", "pytorch_model.bin: pickled weights are refused")
def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@breaks("FileNotFoundError", "no model.safetensors and no model.safetensors.index.json")
def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@breaks("ValueError", "model.safetensors: cannot be read")
def weights_that_are_a_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


@breaks("ValueError", "index.json: 'lm_head.weight' is in '../released/", "a .safetensors file of the folder")
def index_that_climbs_out(folder: Path) -> None:
    edit_index(
        folder,
        lambda index: index["weight_map"].update(
            {"lm_head.weight": "../released/" + index["weight_map"]["lm_head.weight"]}
        ),
    )


@breaks("ValueError", "index.json: 'lm_head.weight' is in '/", "a .safetensors file of the folder")
def index_with_an_absolute_path(folder: Path) -> None:
    edit_index(
        folder,
        lambda index: index["weight_map"].update(
            {"lm_head.weight": str(folder.resolve() / index["weight_map"]["lm_head.weight"])}
        ),
    )


@breaks("ValueError", "a .safetensors file of the folder")
def index_with_a_zero_byte(folder: Path) -> None:
    edit_index(folder, lambda index: index["weight_map"].update({"lm_head.weight": "a\0.safetensors"}))


@breaks("ValueError", "a .safetensors file of the folder")
def index_that_names_a_pickle(folder: Path) -> None:
    edit_index(folder, lambda index: index["weight_map"].update({"lm_head.weight": "pytorch_model.bin"}))


@breaks("FileNotFoundError", "model-00002-of-00003.safetensors: missing")
def index_with_a_missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


@breaks("ValueError", "is missing, but model.safetensors.index.json says that it is here")
def index_that_names_the_wrong_shard(folder: Path) -> None:
    def move(index: dict[str, Any]) -> None:
        there = index["weight_map"]["lm_head.weight"]
        index["weight_map"]["lm_head.weight"] = next(n for n in index["weight_map"].values() if n != there)

    edit_index(folder, move)


@breaks("ValueError", "extra tensor 'lm_head.weight' is not here by model.safetensors.index.json")
def index_that_leaves_a_tensor_out(folder: Path) -> None:
    edit_index(folder, lambda index: index["weight_map"].pop("lm_head.weight"))


@breaks("ValueError", "index.json: weight_map must be an object")
def index_without_a_map(folder: Path) -> None:
    edit_index(folder, lambda index: index.pop("weight_map"))


@breaks("ValueError", "index.json: weight_map must be an object from tensor names to file names")
def index_of_numbers(folder: Path) -> None:
    edit_index(folder, lambda index: index["weight_map"].update({"lm_head.weight": 3}))


@breaks("ValueError", "index.json: not valid JSON")
def index_that_is_not_json(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{")


@breaks("ValueError", "'model.embed_tokens.weight' is missing")
def index_of_nothing(folder: Path) -> None:
    edit_index(folder, lambda index: index.update(weight_map={}))


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_checkpoint_is_an_error_that_names_it(folder: Path, name: str) -> None:
    broken, error, says = BREAKS[name]
    broken(folder)
    expected = FileNotFoundError if error == "FileNotFoundError" else ValueError
    with pytest.raises(expected) as caught:
        load_model(folder)
    assert str(caught.value).startswith(str(folder))
    for part in says:
        assert part in str(caught.value)


LOAD_EACH = """
import sys
from hrmcore.checkpoint import load_model
for folder in sys.argv[1:]:
    try:
        load_model(folder)
        print("loaded")
    except (ValueError, FileNotFoundError) as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
"""


def test_no_broken_checkpoint_crashes_a_process(model: HRM, tmp_path: Path) -> None:
    folders = []
    for name, (broken, _, _) in BREAKS.items():
        folders.append(tmp_path / name / "released")
        save_model(model, folders[-1])
        broken(folders[-1])
    child = subprocess.run([sys.executable, "-c", LOAD_EACH, *folders], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    lines = child.stdout.splitlines()
    assert len(lines) == len(folders)
    for line, folder, (_, error, says) in zip(lines, folders, BREAKS.values(), strict=True):
        assert line.startswith(f"{error} {folder}"), line
        assert all(part in line for part in says), line


def test_flipped_header_bytes_never_load_silently_into_another_shape(model: HRM, folder: Path) -> None:
    """Any single changed byte of the header is an error, or changes nothing that is read."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    unnamed = wrong = 0
    for position in range(0, 8 + length, 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x11]) + content[position + 1 :])
        try:
            tensors = read_tensors(folder)
        except ValueError as error:
            unnamed += not str(error).startswith(str(folder))
        else:
            wrong += any(tensor.shape != model.state_dict()[name].shape for name, tensor in tensors.items())
    assert (unnamed, wrong) == (0, 0)
