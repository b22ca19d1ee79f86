"""GGUF files: what gguf reads from them, and what llama.cpp computes with them."""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from support.checkpoints import edit_config
from support.command_line import hrmcore
from support.runs import MODEL, WORDS, repetitions

from hrmcore.chat import render
from hrmcore.checkpoint import gguf_file
from hrmcore.checkpoint.hrm_text import save_model
from hrmcore.config import HRMConfig
from hrmcore.engine.engine import EMBEDDED_MODEL
from hrmcore.model import HRM
from hrmcore.tokenizer import RELEASED_NAMES, Tokenizer, train_tokenizer

TEXTS = ["repeat alpha beta", "Ünïcode 😀 and  two spaces", "\n\ttabs 1234567", "<boq> stays text", "a▁b", " "]


def saved(folder: Path, tokenizer: Path | None = None, **changes: Any) -> Path:
    """A random model with two layers a stack, in float32, its tokenizer beside it."""
    size = 300 if tokenizer is None else Tokenizer.load(tokenizer).vocab_size + 3  # rows that no token has
    torch.manual_seed(11)
    shape = MODEL | {"vocab_size": size, "num_layers_per_stack": 2, "rope_theta": 5000.0} | changes
    save_model(HRM(HRMConfig(**shape)), folder, tokenizer_folder=tokenizer, allow_xpos=True)
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece tokenizer with a phrase that is one token."""
    folder = tmp_path_factory.mktemp("words")
    texts = [record["instruction"] for record in repetitions(WORDS)]
    train_tokenizer(texts, folder, vocab_size=340, phrases=["repeat alpha"])
    return folder


def dequantised(path: Path) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def expected(model: HRM) -> dict[str, np.ndarray]:
    """The tensors under llama.cpp's names, written out by hand."""
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = {
        "token_embd.weight": weights["embed_tokens.weight"],
        "output.weight": weights["lm_head.weight"],
        "hrm.z_l_init": weights["z_L_init"],
    }
    for block, prefix in enumerate(f"{stack}_module.layers.{layer}" for stack in "LH" for layer in (0, 1)):
        fused = weights[f"{prefix}.gqkv_proj.weight"]
        width = fused.shape[0] // 4
        for part, name in enumerate(("attn_gate", "attn_q", "attn_k", "attn_v")):
            found[f"blk.{block}.{name}.weight"] = fused[part * width : (part + 1) * width]
        fused = weights[f"{prefix}.gate_up_proj.weight"]
        found[f"blk.{block}.ffn_gate.weight"] = fused[: len(fused) // 2]
        found[f"blk.{block}.ffn_up.weight"] = fused[len(fused) // 2 :]
        found[f"blk.{block}.attn_output.weight"] = weights[f"{prefix}.o_proj.weight"]
        found[f"blk.{block}.ffn_down.weight"] = weights[f"{prefix}.down_proj.weight"]
    return found


@pytest.mark.parametrize("dtype", gguf_file.DTYPES)
def test_every_weight_is_there_in_its_dtype(tmp_path: Path, words: Path, dtype: str) -> None:
    """float32 to the bit; bfloat16 to half a unit of 8 bits; blocks of 32 to half a step of their scale."""
    folder, out = saved(tmp_path / "model", words), tmp_path / "model.gguf"
    assert hrmcore("convert", str(folder), str(out), "--to", "gguf", "--dtype", dtype) == 0
    found, wanted = dequantised(out), expected(HRM.from_pretrained(folder))
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        error = np.abs(found[name] - weight)
        if dtype == "float32" or weight.ndim == 1:
            assert not error.any(), name
        elif dtype == "bfloat16":
            assert (error <= 2**-8 * np.abs(weight)).all(), name
        else:
            most = np.abs(weight.reshape(-1, 32)).max(1, keepdims=True)
            # The scale is kept in float16, which rounds it by 2^-11; Q4_0's other end lies a whole step away.
            step, ends = (most / 127, 0.5) if dtype == "int8" else (most / 8, 1.0)
            assert (error.reshape(-1, 32) <= step * ends + most * 2**-10).all(), name


def test_what_the_file_says_of_the_model(tmp_path: Path, words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = saved(tmp_path / "model", words), tmp_path / "model.gguf"
    assert hrmcore("convert", str(folder), str(out), "--to", "gguf", "--dtype", "float32") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{out}: {out.stat().st_size / 1e6:.1f} MB"
    assert "reads a prompt causally, and this model was trained to see it both ways" in said[1]
    fields = {name: field.contents() for name, field in gguf.GGUFReader(out).fields.items()}
    assert fields["general.architecture"] == "hrm_text"
    assert fields["hrm_text.block_count"] == 2 * 2 * (3 + 1)
    assert [fields[f"hrm_text.hrm.{key}"] for key in ("layers_per_stack", "h_cycles", "l_cycles")] == [2, 2, 3]
    assert fields["hrm_text.rope.freq_base"] == 5000.0
    assert fields["hrm_text.hrm.prefix_lm"] is True
    ours = Tokenizer.load(words)
    assert fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"] == (ours.boq, ours.eoa)
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == ours.vocab_size + 3
    assert [tokens[i] for i in (ours.boq, ours.eoq, ours.eoa)] == ["<boq>", "<eoq>", "<eoa>"]
    assert "repeat alpha" in tokens  # a token of its own, with its space
    assert fields["tokenizer.chat_template"].startswith("{{ '<boq><direct>' }}")


def test_a_causal_model_needs_no_warning(tmp_path: Path, words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "model", words, prefix_lm=False)
    assert hrmcore("convert", str(folder), str(tmp_path / "m.gguf"), "--to", "gguf", "--dtype", "float32") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def byte_level(folder: Path, cut: tokenizers.pre_tokenizers.PreTokenizer) -> Path:
    """A tokenizer.json with the released framing tokens."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = cut
    made.decoder = tokenizers.decoders.ByteLevel()
    special = [tokenizers.AddedToken(name, special=True) for name in RELEASED_NAMES.values()]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator([record["instruction"] for record in repetitions(WORDS)], trainer)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_a_tokenizer_that_llama_cpp_lacks_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = byte_level(tmp_path / "known", tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False))
    other = byte_level(tmp_path / "other", tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True))
    for folder, model in ((known, "gpt2"), (other, "none")):
        out = tmp_path / f"{folder.name}.gguf"
        source = saved(tmp_path / f"{folder.name}-model", folder)
        assert hrmcore("convert", str(source), str(out), "--to", "gguf", "--dtype", "float32") == 0
        assert gguf.GGUFReader(out).fields["tokenizer.ggml.model"].contents() == model
        said = capsys.readouterr().out
        assert (f"note: {gguf_file.NO_TEXT}\n" in said) == (model == "none")


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        ({"position_encoding": "xpos"}, (), "MODEL: llama.cpp's hrm_text has no xPos; this model does"),
        ({"attention_window": 64}, (), "MODEL: llama.cpp's hrm_text has no attention window; this model does"),
        ({"H_layers": 1}, (), "MODEL: llama.cpp's hrm_text has no stacks of two depths; this model does"),
        (
            {"intermediate_size": 72},
            ("--dtype", "int4"),
            "MODEL: int4 holds 32 numbers together and intermediate_size is 72; take bfloat16 or float32",
        ),
        ({}, ("--dtype", "int2"), "dtype must be one of float32, bfloat16, int8, int4, got 'int2'"),
    ],
)
def test_what_cannot_be_written_is_one_line(
    tmp_path: Path, changes: dict[str, Any], arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "model", **changes)
    assert hrmcore("convert", str(folder), str(tmp_path / "m.gguf"), "--to", "gguf", *arguments) == 2
    assert capsys.readouterr().err == f"hrmcore convert: {said.replace('MODEL', str(folder))}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_names_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "model")
    (tmp_path / "there.gguf").write_text("kept")
    for name, said in (
        ("model.bin", "a GGUF file's name must end in .gguf"),
        ("there.gguf", "exists already; remove it or name another file"),
        ("no/model.gguf", "no such folder"),
    ):
        assert hrmcore("convert", str(folder), str(tmp_path / name), "--to", "gguf") == 2
        assert capsys.readouterr().err == f"hrmcore convert: {tmp_path / name}: {said}\n"
    assert (tmp_path / "there.gguf").read_text() == "kept"
    edit_config(folder, hidden_act="gelu")
    assert hrmcore("convert", str(folder), str(tmp_path / "m.gguf"), "--to", "gguf") == 2
    assert "hidden_act is 'gelu'" in capsys.readouterr().err


# llama.cpp itself. Building it takes half an hour, so it is not among what developers install; `pip install
# llama-cpp-python` brings it.


@functools.cache
def _silence() -> Any:
    """What llama.cpp calls with its messages; kept, for it calls after a test, too."""
    return pytest.importorskip("llama_cpp").llama_log_callback(lambda level, text, data: None)


class Llama:
    """A GGUF file in llama.cpp: float32 keys and values, no fused attention, one batch a prompt."""

    def __init__(self, path: Path) -> None:
        self.lib = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
        lib = self.lib
        lib.llama_log_set(_silence(), ctypes.c_void_p(0))
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        assert self.model, "llama.cpp does not load the file"
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_threads = 64, 64, 64, 1
        options.type_k = options.type_v = 0  # float32
        options.flash_attn_type = 0
        self.context = lib.llama_init_from_model(self.model, options)
        self.vocabulary = lib.llama_model_get_vocab(self.model)

    def decode(self, ids: list[int], causal: bool = True) -> np.ndarray:
        """The logits after the last of some more tokens."""
        lib = self.lib
        lib.llama_set_causal_attn(self.context, causal)
        array = (lib.llama_token * len(ids))(*ids)
        assert lib.llama_decode(self.context, lib.llama_batch_get_one(array, len(ids))) == 0
        size = lib.llama_vocab_n_tokens(self.vocabulary)
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, -1), (size,)).copy()

    def forget(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def tokens(self, text: str, special: bool = False) -> list[int]:
        encoded, array = text.encode(), (self.lib.llama_token * 500)()
        count = self.lib.llama_tokenize(self.vocabulary, encoded, len(encoded), array, 500, False, special)
        return list(array[:count])

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


@pytest.fixture
def llama(tmp_path: Path, words: Path) -> Iterator[Llama]:
    out = tmp_path / "model.gguf"
    gguf_file.convert_to_gguf(saved(tmp_path / "model", words), out, "float32")
    loaded = Llama(out)
    yield loaded
    loaded.close()


def test_llama_cpp_computes_the_same_logits(llama: Llama, tmp_path: Path) -> None:
    """A prompt seen causally, and one seen both ways as llama_set_causal_attn lets it: then token by token."""
    model = HRM.from_pretrained(tmp_path / "model")
    ids = torch.arange(5, 29)[None] * 7 % 300
    for prefix in (0, 16):
        logits = model(ids, prefix_length=prefix)[0].detach().numpy()
        llama.forget()
        found = [llama.decode(ids[0, :16].tolist(), causal=prefix == 0)]
        found += [llama.decode([token]) for token in ids[0, 16:].tolist()]
        error = np.linalg.norm(np.stack(found) - logits[15:]) / np.linalg.norm(logits[15:])
        assert error <= 1e-4  # float32 through 16 layers' visits, its sums in another order
        assert [row.argmax() for row in found] == [row.argmax() for row in logits[15:]]


def test_llama_cpp_cuts_texts_as_we_do(llama: Llama, words: Path) -> None:
    ours = Tokenizer.load(words)
    for text in [*TEXTS, *(record["instruction"] for record in repetitions(WORDS))]:
        assert llama.tokens(text) == ours.encode(text), text
    assert llama.tokens("<boq><direct>repeat beta alpha<eoq>", special=True) == ours.prompt("repeat beta alpha")


def test_llama_cpp_cuts_byte_level_texts_as_we_do(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "bytes", tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False))
    gguf_file.convert_to_gguf(saved(tmp_path / "model", folder), tmp_path / "m.gguf", "float32")
    llama, ours = Llama(tmp_path / "m.gguf"), Tokenizer.load(folder)
    for text in TEXTS:
        assert llama.tokens(text) == ours.encode(text), text
    llama.close()


@pytest.mark.slow
def test_llama_cpp_answers_the_embedded_models_questions(tmp_path: Path) -> None:
    """Its prompts seen both ways: the answers that ship with the model, from text to text."""
    gguf_file.convert_to_gguf(EMBEDDED_MODEL, tmp_path / "m.gguf", "float32")
    tokenizer = Tokenizer.load(EMBEDDED_MODEL)
    samples = json.loads((EMBEDDED_MODEL / "samples.json").read_text())
    llama = Llama(tmp_path / "m.gguf")
    shown = [s for s in samples if len(tokenizer.prompt(s["instruction"])) + 16 < 64][:4]
    assert shown
    for sample in shown:
        llama.forget()
        prompt = llama.tokens(f"<boq><direct>{sample['instruction']}<eoq>", special=True)
        assert prompt == tokenizer.prompt(sample["instruction"])
        token, answer = int(llama.decode(prompt, causal=False).argmax()), []
        while token != tokenizer.eoa and len(answer) < 16:
            answer.append(token)
            token = int(llama.decode([token]).argmax())
        model = HRM.from_pretrained(EMBEDDED_MODEL)
        ours = model(torch.tensor([[*prompt, *answer]]), prefix_length=len(prompt))[0, len(prompt) - 1 :].argmax(-1)
        assert ours.tolist()[: len(answer)] == answer
    llama.close()


def test_llama_cpps_chat_frames_a_question_as_we_do(tmp_path: Path) -> None:
    """Through the chat template in the file; an answer ends at eoa."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    gguf_file.convert_to_gguf(EMBEDDED_MODEL, tmp_path / "m.gguf", "int8")
    model = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=256, n_threads=1, verbose=False)
    tokenizer = Tokenizer.load(EMBEDDED_MODEL)
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 3 + 4?"},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "And 5 + 4?"},
    ]
    for messages in (talk[1:2], talk):
        found = model.create_chat_completion(messages, temperature=0.0, max_tokens=40)
        assert found["usage"]["prompt_tokens"] == len(tokenizer.prompt(render(messages)))
        assert found["choices"][0]["finish_reason"] == "stop"
    model.close()
