"""An hrm_text checkpoint as a GGUF file, which llama.cpp loads. Needs the extra `gguf`. Imports no torch.

Names of keys and tensors are those of llama.cpp's architecture `hrm_text`: blocks 0 to N − 1 are L's layers, N to
2N − 1 H's, and the block count is that of the cache's slots, N · H_cycles · (L_cycles + 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hrmcore.checkpoint.gguf_vocabulary import chat_template, vocabulary_of
from hrmcore.checkpoint.hrm_text import Arrays, resolve, widened
from hrmcore.config import HRMConfig
from hrmcore.durable import replacing
from hrmcore.tokenizer import NoFramingError, Tokenizer, tokenizer_files

if TYPE_CHECKING:
    from gguf import GGUFWriter

# How weights may be held: (GGUF's type, its number as a kind of file, numbers in a block).
DTYPES = {
    "float32": ("F32", 0, 1),
    "bfloat16": ("BF16", 32, 1),
    "int8": ("Q8_0", 7, 32),
    "int4": ("Q4_0", 2, 32),
}

CAUSAL = (
    "llama.cpp 0.3.36 of llama-cpp-python reads a prompt causally, and this model was trained to see it both ways, so "
    "its answers differ from hrmcore's; llama_set_causal_attn(context, False) while the prompt is read, in one batch, "
    "gives this model's own"
)
NO_TOKENIZER = "the checkpoint has no tokenizer that frames a prompt: the file takes token ids, not text"
NO_TEXT = "llama.cpp has no tokenizer that cuts texts as this one does: the file takes token ids, not text"

_Parts = tuple[tuple[str, NDArray[Any]], ...]


def convert_to_gguf(source: str | Path, out: str | Path, dtype: str = "bfloat16") -> list[str]:
    """Write the GGUF file `out` of a checkpoint; returns what a user should know of it, a line each.

    The file appears whole or not at all. Raises ValueError on an unknown dtype, on a model that llama.cpp cannot
    compute or whose rows do not fill the dtype's blocks, and when gguf is not installed; FileExistsError when `out` is
    there; as reading a checkpoint does.
    """
    out = Path(out)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if out.suffix != ".gguf":
        raise ValueError(f"{out}: a GGUF file's name must end in .gguf")
    if out.exists():
        raise FileExistsError(f"{out}: exists already; remove it or name another file")
    if not out.resolve().parent.is_dir():
        raise ValueError(f"{out}: no such folder")
    folder = resolve(source)
    arrays = Arrays(folder)
    _refuse(folder, arrays.config, dtype)
    gguf = _gguf()
    with replacing(out) as [temporary]:
        writer = gguf.GGUFWriter(str(temporary), "hrm_text", use_temp_file=True)
        try:
            _add_config(writer, arrays.config, folder.resolve().name, DTYPES[dtype][1])
            notes = _add_tokenizer(writer, folder, arrays.config)
            _add_tensors(writer, arrays, dtype)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return [*notes, CAUSAL] if arrays.config.prefix_lm else notes


def _gguf() -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise ValueError("gguf is not installed; `pip install hrmcore[gguf]` brings it") from None
    return gguf


def _refuse(folder: Path, config: HRMConfig, dtype: str) -> None:
    """Raise ValueError on what llama.cpp's architecture does not have."""
    l_layers, h_layers = config.depths
    for missing, there in (
        ("xPos", config.position_encoding != "rope"),
        ("an attention window", config.attention_window > 0),
        ("stacks of two depths", l_layers != h_layers),
    ):
        if there:
            raise ValueError(f"{folder}: llama.cpp's hrm_text has no {missing.removeprefix('an ')}; this model does")
    block = DTYPES[dtype][2]
    rows = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads * head_dim": config.attention_width,
    }
    for name, width in rows.items():
        if width % block:
            raise ValueError(
                f"{folder}: {dtype} holds {block} numbers together and {name} is {width}; take bfloat16 or float32"
            )


def _add_config(writer: GGUFWriter, config: HRMConfig, name: str, kind: int) -> None:
    heads, layers = config.num_attention_heads, config.num_layers_per_stack
    writer.add_name(name)
    writer.add_file_type(kind)
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(layers * config.H_cycles * (config.L_cycles + 1))
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_float32("hrm_text.embedding_scale", float(config.embedding_scale or config.hidden_size**0.5))
    writer.add_uint32("hrm_text.hrm.layers_per_stack", layers)
    writer.add_uint32("hrm_text.hrm.h_cycles", config.H_cycles)
    writer.add_uint32("hrm_text.hrm.l_cycles", config.L_cycles)
    writer.add_bool("hrm_text.hrm.prefix_lm", config.prefix_lm)


def _add_tokenizer(writer: GGUFWriter, folder: Path, config: HRMConfig) -> list[str]:
    """The vocabulary; returns what to say where there is none."""
    tokenizer = None
    if tokenizer_files(folder):
        try:
            tokenizer = Tokenizer.load(folder)
        except (NoFramingError, FileNotFoundError):
            tokenizer = None
    vocabulary = None if tokenizer is None else vocabulary_of(tokenizer)
    if tokenizer is None or vocabulary is None:
        writer.add_tokenizer_model("none")
        return [NO_TOKENIZER if tokenizer is None else NO_TEXT]
    vocabulary.filled(config.vocab_size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.cut)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_unk_token_id(1)
    else:
        writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(tokenizer.boq)
    writer.add_eos_token_id(tokenizer.eoa)
    writer.add_add_bos_token(False)  # the chat template writes it
    writer.add_add_space_prefix(False)
    template = folder / "chat_template.jinja"
    own = template.read_text(encoding="utf-8") if template.is_file() else chat_template(tokenizer, vocabulary)
    writer.add_chat_template(own)
    return []


def _add_tensors(writer: GGUFWriter, arrays: Arrays, dtype: str) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    kind = GGMLQuantizationType[DTYPES[dtype][0]]
    layers = arrays.config.num_layers_per_stack
    for name in arrays:
        for target, part in _parts(name, widened(arrays[name]), layers):
            if part.ndim == 1:
                writer.add_tensor(target, part)
            else:
                writer.add_tensor(target, quantize(np.ascontiguousarray(part), kind), raw_dtype=kind)
        arrays.release()


def _parts(name: str, weight: NDArray[np.float32], layers: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """What a tensor of ours is called there, with its rows: fused matrices are cut."""
    whole = {
        "embed_tokens.weight": "token_embd.weight",
        "lm_head.weight": "output.weight",
        "z_L_init": "hrm.z_l_init",
    }
    if name in whole:
        yield whole[name], weight
        return
    stack, _, layer, kind, _ = name.split(".")
    block = f"blk.{int(layer) + (layers if stack == 'H_module' else 0)}"
    names = {
        "gqkv_proj": ("attn_gate", "attn_q", "attn_k", "attn_v"),
        "o_proj": ("attn_output",),
        "gate_up_proj": ("ffn_gate", "ffn_up"),
        "down_proj": ("ffn_down",),
    }[kind]
    for target, rows in zip(names, np.split(weight, len(names)), strict=True):
        yield f"{block}.{target}.weight", rows
