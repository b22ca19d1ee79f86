"""The packed runner against the torch one, the packed file, and every way to damage it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.engines import distance

from hrmcore import cli
from hrmcore.checkpoint.hrm_text import Arrays, load_model, save_model
from hrmcore.config import HRMConfig
from hrmcore.engine.cpu_runner import CpuRunner, convert, rotations
from hrmcore.engine.engine import Engine, load
from hrmcore.engine.packed_file import PACKED_FILE
from hrmcore.engine.torch_runner import TorchRunner
from hrmcore.model import HRM
from hrmcore.ops.rope import rope_table
from hrmcore.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["what is 3 plus 4?", "é ü", "copy\n1 2\n3 4", "what is 17 plus 25? copy"]


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8", "int4"])
def packed(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / request.param
    convert(checkpoint, folder, request.param)
    return folder


@pytest.fixture
def int8(checkpoint: Path, tmp_path: Path) -> Path:
    convert(checkpoint, tmp_path / "int8", "int8")
    return tmp_path / "int8"


def test_float32_is_the_torch_runner(checkpoint: Path, engine: Engine) -> None:
    reference = Engine(TorchRunner(load_model(checkpoint)), engine.tokenizer, checkpoint)
    assert (engine.parameters, engine.dtype) == (reference.parameters, reference.dtype)
    for prompt in PROMPTS:
        ids = engine.tokenizer.prompt(prompt)
        for prefix in (None, 0, 3):
            assert distance(engine.logits(ids, prefix), reference.logits(ids, prefix)) < 1e-5
        assert engine.generate(prompt, max_new_tokens=80) == reference.generate(prompt, max_new_tokens=80)


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("bfloat16", 5e-4, 1e-2), ("int8", 2e-3, 5e-2), ("int4", 2e-2, 0.5)]
)
def test_a_smaller_dtype_is_close_and_not_the_same(
    checkpoint: Path, engine: Engine, dtype: str, low: float, high: float
) -> None:
    ids = engine.tokenizer.prompt(PROMPTS[3])
    assert low < distance(load(checkpoint, dtype=dtype).logits(ids), engine.logits(ids)) < high


def test_auto_is_what_the_checkpoint_holds(checkpoint: Path, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        save_model(load_model(checkpoint), folder, dtype)
        assert f"torch.{load(folder).dtype}" == str(dtype)


def test_a_packed_file_gives_the_same_bits(checkpoint: Path, packed: Path) -> None:
    direct, mapped = load(checkpoint, dtype=packed.name), load(packed)
    ids = direct.tokenizer.prompt(PROMPTS[0])
    assert torch.equal(direct.logits(ids), mapped.logits(ids))
    assert mapped.config == direct.config
    assert mapped.generate(PROMPTS, max_new_tokens=20) == direct.generate(PROMPTS, max_new_tokens=20)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_a_batch_of_sixteen_cancelled_at_random_gives_no_wrong_token(packed: Path, kv_dtype: str | None) -> None:
    runner, chance = CpuRunner.from_checkpoint(packed, "auto", kv_dtype, None, 0), random.Random(0)
    engine = Engine(runner, None, packed)
    prompts = [[chance.randrange(engine.config.vocab_size) for _ in range(chance.randint(1, 70))] for _ in range(24)]
    alone = [list(engine.tokens(ids, max_new_tokens=12, ignore_eos=True)) for ids in prompts]
    kept = runner.core.cache_pages_used  # of what the engine has answered
    running: dict[int, tuple[int, list[int]]] = {}
    for _ in range(150):
        while len(running) < 16:
            index = chance.randrange(len(prompts))
            (handle,), rows = runner.open([prompts[index]], [len(prompts[index])])
            running[handle] = (index, [int(rows[0].argmax())])
        rows = runner.step(list(running), [tokens[-1] for _, tokens in running.values()])
        for (_, tokens), row in zip(running.values(), rows, strict=True):
            tokens.append(int(row.argmax()))
        for handle, (index, tokens) in list(running.items()):
            assert tokens == alone[index][: len(tokens)]
            if len(tokens) == 12 or chance.random() < 0.1:
                runner.close(handle)
                del running[handle]
    for handle in running:
        runner.close(handle)
    assert runner.core.cache_pages_used == kept


def test_a_cache_that_is_full_is_a_clear_error_and_others_go_on(int8: Path) -> None:
    runner = CpuRunner.from_checkpoint(int8, "auto", None, None, cache_bytes=0)
    ids = list(range(40))
    (first,), _ = runner.open([ids], [40])
    context = runner.config.max_position_embeddings
    held = [runner.open([[1] * context], [0])[0][0] for _ in range(3)]
    # A context of 32 pages, one for a look at the layers, and a page for each of 64 sequences.
    with pytest.raises(MemoryError, match=r"KV cache has no room.*of its 128 pages"):
        runner.open([[1] * context], [0])
    row = runner.step([first], [7])
    for handle in held:
        runner.close(handle)
    assert np.array_equal(row[0], runner.logits([*ids, 7], 40)[-1])


GENERATE = """
import sys, hrmcore
engine = hrmcore.load(sys.argv[1])
prompt, options = "what is 3 plus 4?", {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
answers = [engine.generate(prompt, **options), "".join(engine.stream(prompt, **options))]
answers += engine.generate([prompt], **options)
ids = engine.tokenizer.prompt(prompt)
print(len(set(answers)), len(list(engine.tokens(ids, max_new_tokens=12))), "torch" in sys.modules)
logits = engine.logits(ids)
print(type(logits).__module__, "torch" in sys.modules)
"""


@pytest.mark.parametrize("kind", ["checkpoint", "int8"])
def test_generation_imports_no_torch(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    child = subprocess.run([sys.executable, "-c", GENERATE, folder], capture_output=True, text=True, check=True)
    assert child.stdout == "1 12 False\ntorch True\n"


@pytest.mark.parametrize(("head_dim", "theta"), [(8, 10000.0), (32, 10000.0), (128, 10000.0), (64, 1e6)])
def test_rotations_are_those_of_the_model(checkpoint: Path, head_dim: int, theta: float) -> None:
    config = load_model(checkpoint).config
    table = rotations(config.replace(head_dim=head_dim, rope_theta=theta, max_position_embeddings=4096))
    expected = rope_table(4096, head_dim, theta).numpy()
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, expected, rtol=0, atol=1.2e-7)
    assert np.array_equal(table == 0, expected == 0)


OUT_OF_MEMORY = """
import resource, sys, numpy as np
from pathlib import Path
from hrmcore.engine.cpu_runner import CpuRunner
runner = CpuRunner.from_checkpoint(Path(sys.argv[1]), "auto", None, 1, cache_bytes=1 << 40)
(handle,), rows = runner.open([list(range(40))], [40])
expected = runner.logits([*range(40), 7, 8], 40)
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 20), -1))
held = []
try:
    for _ in range(2000):  # caches, or the room for a prefill, whichever comes first
        held += runner.open([[1] * 2000], [2000])[0]
except MemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print([bool(np.array_equal(runner.step([handle], [token])[0], row)) for token, row in zip((7, 8), expected[-2:])])
"""


def test_a_system_without_memory_is_a_clear_error_and_others_go_on(int8: Path) -> None:
    child = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY, int8], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    error, unharmed = child.stdout.splitlines()
    assert re.fullmatch(r"out of memory: the system has no \d+ MB to give", error)
    assert unharmed == "[True, True]"


def damage(path: Path, position: int, value: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position, os.SEEK_END if position < 0 else os.SEEK_SET)
        file.write(value)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, b"X", "not a packed checkpoint"),
        (8, b"\x09", "packed format version 9, this hrmcore reads 1"),
        (60, b"?", "damaged, its header does not match its checksum"),
        (12, b"\xff\xff\xff\xff", "damaged, its header"),
        (-1, b"\x55", "damaged, the weights do not match their checksum"),
        (30000, b"\x55", "damaged, the weights do not match their checksum"),
    ],
)
def test_a_changed_file_is_refused(int8: Path, position: int, value: bytes, message: str) -> None:
    damage(int8 / PACKED_FILE, position, value)
    with pytest.raises(ValueError, match=rf"{PACKED_FILE}: {message}"):
        load(int8)


CONFIG = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 32, "num_layers_per_stack": 1}
HEADER = {"config": {**CONFIG, "num_attention_heads": 2, "head_dim": 16}, "dtype": "int8", "bytes": 8, "checksum": 1}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "must hold a JSON object, got list"),
        (1, "must hold a JSON object, got int"),
        (None, "must hold a JSON object, got NoneType"),
        ("[" * 100000, r"not valid JSON"),
        ('{"dtype": "int8", "dtype": "int8"}', "not valid JSON .the key 'dtype' comes twice"),
        ('{"bytes": NaN}', "its header has the missing key 'checksum'"),
        (HEADER | {"extra": 1}, "its header has the unknown key 'extra'; the keys are config, dtype, bytes, checksum"),
        *(
            ({key: value for key, value in HEADER.items() if key != gone}, f"its header has the missing key '{gone}'")
            for gone in HEADER
        ),
        *((HEADER | {"config": value}, "config in its header must be an object") for value in ([], None, "x", 1)),
        (HEADER | {"config": {}}, "config: missing key 'vocab_size'"),
        (HEADER | {"config": HEADER["config"] | {"hidden_size": "32"}}, "config: hidden_size must be of type int"),
        (HEADER | {"config": HEADER["config"] | {"rms_norm_eps": float("nan")}}, "config: rms_norm_eps must be"),
        *((HEADER | {"dtype": value}, "dtype in its header must be one of float32") for value in (["int8"], 8, "int9")),
        *(
            (HEADER | {key: value}, f"{key} in its header must be a whole number below 2..6")
            for key in ("bytes", "checksum")
            for value in (-1, 1.5, float("nan"), float("inf"), True, None, "8", [8], 1 << 64, 10**4000)
        ),
        (HEADER | {"bytes": 7}, "its header states 7 bytes, the model has"),
    ],
)
def test_a_header_that_is_not_ours_is_one_error_that_names_the_file(
    header: object, message: str, tmp_path: Path
) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    start = struct.pack("<8sII32s", b"HRMPACK\0", 1, len(text), hashlib.sha256(text).digest())
    (tmp_path / PACKED_FILE).write_bytes(start + text + bytes(8192))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path / PACKED_FILE))}: {message}"):
        load(tmp_path)


@pytest.mark.parametrize(("left", "message"), [(0, "not a packed"), (30, "not a packed"), (100, "damaged, its header")])
def test_a_file_cut_in_its_header_is_refused(int8: Path, left: int, message: str) -> None:
    os.truncate(int8 / PACKED_FILE, left)
    with pytest.raises(ValueError, match=message):
        load(int8)


def test_a_file_cut_in_its_weights_is_refused(int8: Path) -> None:
    path = int8 / PACKED_FILE
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"weights\.hrmpack: truncated, \d+ bytes where \d+ are needed"):
        load(int8)


def test_a_file_changed_while_in_use_stops_the_engine(int8: Path) -> None:
    engine = load(int8)
    ids = engine.tokenizer.prompt(PROMPTS[0])
    engine.logits(ids)
    damage(int8 / PACKED_FILE, 30000, b"\x55")
    os.utime(int8 / PACKED_FILE, (1, 1))  # coarse clocks: the write itself may carry the same time
    with pytest.raises(OSError, match="the file changed while it was in use"):
        engine.logits(ids)


@pytest.fixture(scope="module")
def two_packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("two_packed")
    config = HRMConfig(61, 128, 256, 2, 2, 64, max_position_embeddings=700)
    for seed, name in enumerate(("int8", "int4")):
        torch.manual_seed(seed)
        save_model(HRM(config), folder / "whole" / name)
        convert(folder / "whole" / name, folder / name, name)
    return folder / "int8", folder / "int4"


def cut_short(case: str, packed: tuple[Path, Path], folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    copy = shutil.copytree(packed[0], folder / "cut")
    command = [sys.executable, *options, Path(__file__).parents[1] / "soak" / "cut_short.py", case, copy, packed[1]]
    environment = os.environ | {"HRMCORE_ISA": "generic"}  # slow, so that a small model's step is long
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("case", ["step", "answers"])
def test_a_file_cut_short_in_a_step_is_an_error_and_another_model_goes_on(
    case: str, two_packed: tuple[Path, Path], tmp_path: Path
) -> None:
    child = cut_short(case, two_packed, tmp_path)
    assert child.returncode == 0, child.stderr
    error = f"{tmp_path}/cut/{PACKED_FILE}: the file changed while it was in use; load the model again"
    assert child.stdout.splitlines() == [f"1 {error}", error, "0 True"]


@pytest.mark.parametrize("options", [(), ("-X", "faulthandler")])
def test_a_fault_elsewhere_ends_the_process_as_before(
    options: tuple[str, ...], two_packed: tuple[Path, Path], tmp_path: Path
) -> None:
    child = cut_short("foreign", two_packed, tmp_path, *options)
    assert child.returncode == -signal.SIGBUS
    assert child.stdout == ""
    assert ("Fatal Python error: Bus error" in child.stderr) == bool(options)


def test_a_checkpoint_cut_short_while_it_is_packed_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "cut")
    arrays = Arrays(folder)
    runner = CpuRunner(arrays.config, "int8", None, 1, cache_bytes=0)
    runner.core.allocate_weights()
    os.truncate(folder / "model.safetensors", 0)
    name = "lm_head.weight"
    with pytest.raises(OSError, match=f"{name}: its file was cut short while it was read"):
        runner.core.set_weight(name, arrays[name])


def test_a_file_that_is_replaced_or_removed_stays_readable(int8: Path) -> None:
    engine = load(int8)
    ids = engine.tokenizer.prompt(PROMPTS[0])
    before = engine.logits(ids)
    (int8 / PACKED_FILE).unlink()
    assert torch.equal(engine.logits(ids), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["lm_head.weight", "embed_tokens.weight", "z_L_init", "H_module.layers.0.o_proj.weight"]
)
def test_a_weight_that_is_not_finite_is_named_at_load(
    name: str, stored: torch.dtype, dtype: str, tmp_path: Path
) -> None:
    config = HRMConfig(61, 40, 56, 1, 2, 24, max_position_embeddings=64)  # no group of columns is full
    for value in (float("nan"), float("inf"), float("-inf")):
        model = HRM(config)
        with torch.no_grad():
            model.state_dict()[name].view(-1)[-1] = value
        save_model(model, tmp_path, stored)
        with pytest.raises(ValueError, match=f"^{tmp_path}: '{name}' has a value that is NaN or infinite"):
            load(tmp_path, dtype=dtype)


def test_the_largest_finite_weights_are_finite(tmp_path: Path) -> None:
    model = HRM(HRMConfig(61, 40, 56, 1, 2, 24, max_position_embeddings=64))
    with torch.no_grad():
        for weight in model.state_dict().values():
            weight.fill_(torch.finfo(torch.float32).max)
    save_model(model, tmp_path)
    assert load(tmp_path).dtype == "float32"
    load_model(tmp_path)


def test_logits_that_are_no_numbers_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(["what is 3 plus 4?", "copy 1 2 3 4 5 6 7"] * 20, tmp_path, vocab_size=300)
    model = HRM(HRMConfig(300, 40, 56, 1, 2, 24, max_position_embeddings=64))
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.finfo(torch.float32).max)
    save_model(model, tmp_path)
    assert cli.main(["generate", "copy 1", "--model", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"hrmcore generate: the model's logits are not finite: \S+ for token \d+\n", error)


def test_the_command_converts(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", str(checkpoint), str(tmp_path / "out"), "--dtype", "int4"]) == 0
    assert "weights.hrmpack" in capsys.readouterr().out
    assert load(tmp_path / "out").dtype == "int4"


def test_wrong_conversions_are_named(checkpoint: Path, int8: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, int8, int4, got 'fp4'"):
        convert(checkpoint, tmp_path / "out", "fp4")
    with pytest.raises(ValueError, match="is packed already"):
        convert(int8, tmp_path / "out", "int4")
    with pytest.raises(ValueError, match="holds a checkpoint"):
        convert(checkpoint, shutil.copytree(checkpoint, tmp_path / "copy"), "int8")
    with pytest.raises(ValueError, match="holds int8 weights; dtype must be auto or int8"):
        load(int8, dtype="bfloat16")
    assert not (tmp_path / "out").exists()
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "hrm_text"
