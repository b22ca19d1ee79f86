"""The CPU engine (csrc/engine) behind the Runner protocol. Imports no torch.

Shapes: T tokens, S sequences, V vocabulary.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hrmcore import _C
from hrmcore.checkpoint.hrm_text import Arrays, key_table, resolve
from hrmcore.config import HRMConfig
from hrmcore.engine.packed_file import PACKED_FILE, Header, read_header, write_packed
from hrmcore.engine.runner import DTYPES, PAGE, Interrupted, Rows
from hrmcore.positions import rotary_table, xpos_log_decay
from hrmcore.tokenizer import TOKENIZER_FILES

_CACHED_BYTES = 32 << 20
_MOST_TOGETHER = 64  # sequences, each of which may hold a page that is not full


class CpuRunner:
    """Sequences over packed weights. Their logits are bit-identical at any batch size and on any number of threads.

    `cache_bytes` is the room for the keys and values of all open sequences. It is raised where it could not hold one
    sequence as long as the context; a page for each of 64 sequences comes on top, and a context for `layers`. A call
    that does not fit raises MemoryError. `kv_dtype` None is float32 beside float32 weights and bfloat16 beside others.
    """

    def __init__(
        self, config: HRMConfig, dtype: str, kv_dtype: str | None, threads: int | None, cache_bytes: int
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.parameters = config.parameters
        kv_dtype = kv_dtype or ("float32" if dtype == "float32" else "bfloat16")
        page_bytes = _C.page_bytes(kv_dtype, config.cache_slots, config.num_attention_heads, config.head_dim)
        longest = -(-config.context // PAGE)
        pages = max(cache_bytes // page_bytes, longest) + _MOST_TOGETHER + longest
        self.cache_bytes_per_token = page_bytes // PAGE
        assert config.embedding_scale is not None  # HRMConfig fills it in
        self.core = _C.Engine(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            L_layers=config.depths[0],
            H_layers=config.depths[1],
            num_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            H_cycles=config.H_cycles,
            L_cycles=config.L_cycles,
            eps=config.rms_norm_eps,
            embedding_scale=config.embedding_scale,
            rope=rotations(config),
            dtype=dtype,
            kv_dtype=kv_dtype,
            threads=threads or _C.num_threads(),
            cache_tokens=pages * PAGE,
            log_decay=log_decay(config),
            window=config.attention_window,
        )
        # A window gives back what one would have to go back to. Weights that the processor's cache holds make a step's
        # time grow with its rows, so that guesses cost what they save.
        self.verifies = config.attention_window == 0 and self.core.weight_bytes > _CACHED_BYTES

    @classmethod
    def from_checkpoint(
        cls,
        folder: Path,
        dtype: str,
        kv_dtype: str | None,
        threads: int | None,
        cache_bytes: int,
        attention_window: int | None = None,
    ) -> CpuRunner:
        """Pack a checkpoint, or map one that is packed. dtype auto and attention_window None are the checkpoint's.

        Raises FileNotFoundError and ValueError as `Arrays` does, and ValueError when a packed checkpoint is damaged or
        holds another dtype.
        """
        packed = folder / PACKED_FILE
        if packed.is_file():
            header = read_header(packed)
            if dtype not in ("auto", header.dtype):
                raise ValueError(f"{packed}: holds {header.dtype} weights; dtype must be auto or {header.dtype}")
            config = _windowed(header.config, attention_window)
            runner = cls(config, header.dtype, kv_dtype, threads, cache_bytes)
            runner._map(packed, header)
            return runner
        arrays = Arrays(folder)
        if dtype == "auto":
            dtype = "bfloat16" if arrays.dtype("lm_head.weight") == "bfloat16" else "float32"
        runner = cls(_windowed(arrays.config, attention_window), dtype, kv_dtype, threads, cache_bytes)
        runner.core.allocate_weights()
        # The largest tensor first, while little is packed: each is mapped in addition to what is packed already.
        for key in sorted(key_table(runner.config), key=lambda key: -math.prod(key.shape)):
            array = arrays[key.name]
            try:
                runner.core.set_weight(key.name, array.astype(np.float32) if array.dtype == np.float16 else array)
            except ValueError as error:
                raise ValueError(f"{folder}: {error}") from None
            arrays.release()
        return runner

    def _map(self, path: Path, header: Header) -> None:
        if header.bytes != self.core.weight_bytes:
            raise ValueError(f"{path}: its header states {header.bytes} bytes, the model has {self.core.weight_bytes}")
        try:
            self.core.map_weights(str(path), header.offset, header.checksum)
        except OSError as error:
            raise ValueError(str(error)) from None

    @property
    def open_sequences(self) -> int:
        """How many sequences are open."""
        count: int = self.core.open_requests
        return count

    def open(
        self,
        prompts: Sequence[Sequence[int]],
        prefix_lengths: Sequence[int],
        stop: Callable[[], bool] | None = None,
    ) -> tuple[list[int], Rows]:
        """Prefill new sequences; returns a handle for each, and the logits (S, V) float32 after their last tokens.

        A long prefill, or the wait for another thread's, calls `stop` several times a second and raises Interrupted
        when it returns True. Ctrl-C raises KeyboardInterrupt. Either way, none of the new sequences stays open.
        """
        prefill = self.begin(prompts, prefix_lengths)
        try:
            rows = prefill.advance(None, stop)
            assert rows is not None
            return prefill.handles, rows
        except BaseException:
            prefill.close()
            raise

    def begin(self, prompts: Sequence[Sequence[int]], prefix_lengths: Sequence[int]) -> SlicedPrefill:
        """`open` in slices, cut between the halves of a layer's visit: the bits are the same."""
        return SlicedPrefill(self.core, prompts, [n if self.config.prefix_lm else 0 for n in prefix_lengths])

    def keep(self, handle: int) -> int:
        """What a sequence holds now, to be forked and closed. Costs nothing: it shares the pages."""
        kept: int = self.core.keep(handle)
        return kept

    def fork(self, kept: int) -> int:
        """A new sequence that holds what was kept. Copies a page at most; waits for the step that is under way."""
        handle: int = self.core.fork(kept)
        return handle

    def step(self, handles: Sequence[int], tokens: Sequence[int]) -> Rows:
        """Append one token to each of these sequences; returns the logits (S, V) float32 that follow."""
        return self._advance(handles, [[token] for token in tokens])

    def verify(self, handles: Sequence[int], tokens: Sequence[Sequence[int]]) -> Rows:
        """Append some tokens to each of these sequences; the logits after every one, with the bits of `step`."""
        rows: Rows = np.empty((sum(map(len, tokens)), self.config.vocab_size), np.float32)
        self.core.step(handles, tokens, rows, True)
        return rows

    def rewind(self, handle: int, length: int) -> None:
        """Take back a sequence's last tokens, so that `length` are left."""
        self.core.rewind(handle, length)

    def close(self, handle: int) -> None:
        """Release what a sequence holds; at the end of the step, when it is in one. Never waits for a step."""
        self.core.close(handle)

    def logits(self, ids: Sequence[int], prefix_length: int) -> Rows:
        """The logits (T, V) float32 after every token."""
        handle = self.core.open(prefix_length if self.config.prefix_lm else 0)
        try:
            logits = np.empty((len(ids), self.config.vocab_size), np.float32)
            self.core.step([handle], [ids], logits, True)
            return logits
        finally:
            self.close(handle)

    def layers(self, ids: Sequence[int], prefix_length: int, stop: Callable[[], bool] | None = None) -> Rows:
        """The logits (cache_slots, V) float32 after the last token, read after each layer of each visit."""
        handle = self.core.open(prefix_length if self.config.prefix_lm else 0)
        try:
            logits = np.empty((self.config.cache_slots, self.config.vocab_size), np.float32)
            if not self.core.step([handle], [ids], logits, False, stop, every_layer=True):
                raise Interrupted
            return logits
        finally:
            self.close(handle)

    def _advance(
        self, handles: Sequence[int], ids: Sequence[Sequence[int]], stop: Callable[[], bool] | None = None
    ) -> Rows:
        logits = np.empty((len(handles), self.config.vocab_size), np.float32)
        if not self.core.step(handles, ids, logits, False, stop):
            raise Interrupted
        return logits


class SlicedPrefill:
    """New sequences in the core, and the step that reads their prompts."""

    def __init__(self, core: _C.Engine, prompts: Sequence[Sequence[int]], prefixes: Sequence[int]) -> None:
        self._core = core
        self.handles = [core.open(prefix) for prefix in prefixes]
        try:
            self._rows: Rows = np.empty((len(prompts), core.vocab_size), np.float32)
            self.step: _C.Step | None = core.begin(self.handles, prompts)
        except BaseException:
            self._close_all()
            raise

    def advance(self, tokens: int | None, stop: Callable[[], bool] | None = None) -> Rows | None:
        """The next slice: the work of a step of so many tokens, rounded down to halves of a layer, one at least."""
        assert self.step is not None  # and in no variable, which the traceback of an error would keep
        done = self.step.run(self._rows, self.step.tokens if tokens is None else tokens, stop)
        if done is None:
            raise Interrupted
        if done:
            self.step = None  # or its sequences would be in a step still
        return self._rows if done else None

    def close(self) -> None:
        """Give it up. A slice that is under way on another thread ends first."""
        self.step = None
        self._close_all()

    def _close_all(self) -> None:
        for handle in self.handles:
            self._core.close(handle)


def _windowed(config: HRMConfig, attention_window: int | None) -> HRMConfig:
    return config if attention_window is None else config.replace(attention_window=attention_window)


def rotations(config: HRMConfig) -> NDArray[np.float32]:
    """The table of rotations of a model: (positions, head_dim)."""
    xpos = config.position_encoding == "xpos"
    length = config.context if xpos else config.max_position_embeddings
    return rotary_table(length, config.head_dim, config.rope_theta, exact=xpos)


def log_decay(config: HRMConfig) -> NDArray[np.float32] | None:
    """The log decay of a model's xPos: (head_dim / 2); None for a RoPE model."""
    return None if config.position_encoding == "rope" else xpos_log_decay(config.head_dim, config.xpos_scale_base)


def convert(source: str | Path, out: str | Path, dtype: str) -> Path:
    """Pack a checkpoint into the folder `out` and copy its tokenizer there; returns the packed file.

    The file appears whole or not at all. Raises ValueError on an unknown dtype, a broken or already packed checkpoint,
    or an `out` that holds another kind of checkpoint.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    folder, out = resolve(source), Path(out)
    if (folder / PACKED_FILE).is_file():
        raise ValueError(f"{folder}: is packed already; convert the checkpoint that it was made from")
    if (out / "config.json").exists():
        raise ValueError(f"{out}: holds a checkpoint; give a folder of its own to the packed one")
    runner = CpuRunner.from_checkpoint(folder, dtype, None, None, cache_bytes=0)
    header = {
        "config": runner.config.to_dict(),
        "dtype": dtype,
        "bytes": runner.core.weight_bytes,
        "checksum": runner.core.checksum(),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    return write_packed(out / PACKED_FILE, header, runner.core.packed_weights())
