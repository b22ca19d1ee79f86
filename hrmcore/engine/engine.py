"""Load a model and generate: text or token ids, one prompt or many, whole or streamed.

Shapes: T tokens, V vocabulary. What runs the recurrence is behind `hrmcore.engine.runner.Runner`.
On the CPU, only `Engine.logits` imports torch.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, overload

import numpy as np
from numpy.typing import NDArray

from hrmcore import _C
from hrmcore.checkpoint.hrm_text import CONFIG_FILE, resolve
from hrmcore.config import WINDOW_MULTIPLE, HRMConfig
from hrmcore.engine.chat_template import ChatTemplate, Conversation, conversation, prompt_ids
from hrmcore.engine.cpu_runner import CpuRunner
from hrmcore.engine.packed_file import PACKED_FILE
from hrmcore.engine.prefills import Prefills
from hrmcore.engine.runner import DTYPES
from hrmcore.engine.sampling import Sampler, Sampling, is_integer, require
from hrmcore.engine.scheduler import Key, Limits, Scheduler
from hrmcore.engine.streams import Answer, Request, Scored, StopFilter, Tokens
from hrmcore.tokenizer import NoFramingError, Tokenizer

if TYPE_CHECKING:
    from typing import Unpack  # Python 3.11; only type checkers come here

    from torch import Tensor

    from hrmcore.engine.runner import Runner

EMBEDDED_MODEL = Path(__file__).parents[1] / "assets" / "tiny"

# Requests decoded together: at most this many, holding at most this much KV cache if all of them ran to their limit.
MAX_BATCH = 64
CACHE_BUDGET = 4 << 30  # bytes
PREFILL_TOKENS = 4096  # in one packed prefill; a longer prompt goes alone

KEPT_BUDGET = CACHE_BUDGET // 8  # of them, for the prefills of instructions that may be asked again
MOST_LOGPROBS = 20  # as in OpenAI's protocol


class TextOptions(TypedDict, total=False):
    """The options of `Engine.generate`, explained at `Engine.stream`."""

    max_new_tokens: int
    condition: str
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    stop: str | Sequence[str] | None
    seed: int | None


def load(
    path: str | Path | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    kv_dtype: str | None = None,
    attention_window: int | None = None,
) -> Engine:
    """Load a checkpoint folder, or a hub id from the local cache; None is the embedded tiny model.

    `device` is cpu, cuda or cuda:N; on CUDA, decoding runs the fused step and prefill the model in torch.
    `dtype` is float32, bfloat16, int8 or int4; auto is what the checkpoint holds. `kv_dtype`, of the cached keys and
    values, is float32, bfloat16 or int8, on CUDA one of the last two; None is float32 beside float32 weights, else
    bfloat16. `threads` sets the threads of the kernels, and of torch where it is loaded, for the whole process; None
    leaves them as they are.

    `attention_window` (a multiple of 64, or 0 for none) replaces the model's, for inputs longer than it was trained on:
    each token sees its own window of so many tokens and the one before; a token of the prefix also sees the one after.
    The KV cache keeps no more of the response than that.

    Raises ValueError on an argument out of range or a broken checkpoint, FileNotFoundError when there is none.
    """
    require(dtype in ("auto", *DTYPES), "dtype", f"auto, {', '.join(DTYPES[:-1])} or {DTYPES[-1]}", dtype)
    require(kv_dtype in (None, "float32", "bfloat16", "int8"), "kv_dtype", "float32, bfloat16 or int8", kv_dtype)
    window = attention_window
    fits = window is None or (is_integer(window) and window >= 0 and window % WINDOW_MULTIPLE == 0)
    require(fits, "attention_window", f"a multiple of {WINDOW_MULTIPLE}, 0 or None", window)
    _check_device(device)
    if threads is not None:
        require(is_integer(threads) and 1 <= threads <= 1024, "threads", "a whole number from 1 to 1024", threads)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
        _C.set_num_threads(threads)
    if path is None and not any((EMBEDDED_MODEL / name).is_file() for name in (CONFIG_FILE, PACKED_FILE)):
        raise FileNotFoundError("this installation has no embedded model: give the path of a checkpoint")
    folder = EMBEDDED_MODEL if path is None else resolve(path)
    runner = _open_runner(folder, dtype, device, threads, kv_dtype, window)
    try:
        return Engine(runner, _find_tokenizer(folder, runner.config), folder)
    except NoFramingError as error:  # its tokens need no frame
        return Engine(runner, None, folder, f"{error}, so no prompt can be framed")


def _open_runner(
    folder: Path, dtype: str, device: str, threads: int | None, kv_dtype: str | None, window: int | None
) -> Runner:
    if device == "cpu":
        return CpuRunner.from_checkpoint(folder, dtype, kv_dtype, threads, CACHE_BUDGET, window)
    from hrmcore.engine.cuda_runner import CudaRunner

    return CudaRunner.from_checkpoint(folder, dtype, device, window, kv_dtype)


class Engine:
    """A loaded model: what `load` returns, or any Runner with a tokenizer and the folder that both came from.

    Every method raises ValueError on a bad argument, before anything runs. `tokenizer` is None when the checkpoint came
    without one, or with one of another kind of model; then only `tokens` and `logits` work. `why_no_tokenizer` says it.
    """

    def __init__(
        self, runner: Runner, tokenizer: Tokenizer | None, source: Path, why_no_tokenizer: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.source = source
        self._runner = runner
        self._why_no_tokenizer = why_no_tokenizer or f"{source} has no tokenizer"
        self._prefills = Prefills(runner, KEPT_BUDGET // runner.cache_bytes_per_token)

    @property
    def config(self) -> HRMConfig:
        """The model's configuration."""
        return self._runner.config

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self._runner.parameters

    @property
    def dtype(self) -> str:
        """What the weights are held as: float32, bfloat16, int8 or int4."""
        return self._runner.dtype

    @property
    def open_requests(self) -> int:
        """How many answers hold a part of the KV cache now: begun, and neither ended nor closed."""
        return self._runner.open_sequences

    @property
    def reused_prefills(self) -> int:
        """How many requests began with the prefill of an equal instruction instead of one of their own."""
        return self._prefills.reused

    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ValueError saying what is missing when there is none that frames a prompt."""
        if self.tokenizer is None:
            raise ValueError(f"{self._why_no_tokenizer}: give token ids to Engine.tokens instead")
        return self.tokenizer

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: str | Conversation, *, logprobs: None = None, **options: Unpack[TextOptions]
    ) -> str: ...

    @overload
    def generate(
        self, prompt: Sequence[str | Conversation], *, logprobs: None = None, **options: Unpack[TextOptions]
    ) -> list[str]: ...

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: str | Conversation, *, logprobs: int, **options: Unpack[TextOptions]
    ) -> Scored: ...

    @overload
    def generate(
        self, prompt: Sequence[str | Conversation], *, logprobs: int, **options: Unpack[TextOptions]
    ) -> list[Scored]: ...

    def generate(
        self,
        prompt: str | Conversation | Sequence[str | Conversation],
        *,
        logprobs: int | None = None,
        **options: Unpack[TextOptions],
    ) -> str | list[str] | Scored | list[Scored]:
        """Answer one prompt, or many in one batch, in their order. Takes the options of `stream`.

        Every prompt of a batch gets the answer that it would get alone, with the same seed. With `logprobs` an answer
        is a Scored: text, finish and logprobs.
        """
        if isinstance(prompt, str | Conversation):
            answers = [self.stream(prompt, logprobs=logprobs, **options)]
        else:
            answers = self._begin_all(prompt, logprobs, options)
        pieces: list[list[str]] = [[] for _ in answers]
        for index, token in self._decode([answer.request for answer in answers]):
            pieces[index].append(answers[index].push(token))
        texts = ["".join([*parts, answer.flush()]) for parts, answer in zip(pieces, answers, strict=True)]
        if logprobs is None:
            return texts[0] if isinstance(prompt, str | Conversation) else texts
        scored = [Scored(text, a.finish, a.logprobs) for text, a in zip(texts, answers, strict=True)]
        return scored[0] if isinstance(prompt, str | Conversation) else scored

    def _begin_all(
        self, prompts: Sequence[str | Conversation], logprobs: int | None, options: TextOptions
    ) -> list[Answer]:
        answers = []
        for index, text in enumerate(prompts):
            try:
                answers.append(self.stream(text, logprobs=logprobs, **options))
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from None
        return answers

    def stream(
        self,
        prompt: str | Conversation,
        *,
        max_new_tokens: int = 256,
        condition: str = "direct",
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        logprobs: int | None = None,
    ) -> Answer:
        """Answer a prompt piece by piece. Pieces are whole characters; `.close()` cancels.

        The answer ends where the model ends it, before the first `stop` string, after max_new_tokens, or at the end of
        the context; `.finish` says which. Temperature 0 is greedy. The same seed gives the same answer.

        `logprobs` (0 to 20) asks for the log probability of each token, and of so many of the most probable ones in its
        place: `.logprobs`.
        """
        tokenizer = self.text_tokenizer()
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        stops = _check_stop(stop)
        known = logprobs is None or (is_integer(logprobs) and 0 <= logprobs <= MOST_LOGPROBS)
        require(known, "logprobs", f"a whole number from 0 to {MOST_LOGPROBS}, or None", logprobs)
        ids = self.prompt_ids(prompt, condition)
        request = self._request(ids, len(ids), max_new_tokens, sampling, ignore_eos=False)
        request.top = logprobs
        return Answer(Tokens(request, self._follow(request)), tokenizer, StopFilter(stops))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[TextOptions],
    ) -> str:
        """Answer the last of messages ({"role", "content"}), which become a prompt as `conversation` says."""
        return "".join(self.stream_chat(messages, tools, **options))

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[TextOptions],
    ) -> Answer:
        """`chat`, piece by piece as `stream` gives them."""
        return self.stream(self.conversation(messages, tools), **options)

    def conversation(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str | Conversation:
        """The prompt that messages become: through the checkpoint's own chat template, else `hrmcore.chat.render`.

        Only such a template takes `tools`, in OpenAI's form.
        """
        return conversation(self._template, messages, tools)

    def prompt_ids(self, prompt: str | Conversation, condition: str = "direct") -> list[int]:
        """The tokens that a prompt becomes, all of which see each other both ways."""
        require(isinstance(prompt, str | Conversation), "prompt", "text or a list of texts", prompt)
        return prompt_ids(self.text_tokenizer(), prompt, condition)

    @functools.cached_property
    def _template(self) -> ChatTemplate | None:
        return ChatTemplate.find(self.source)

    def tokens(
        self,
        ids: Sequence[int] | Tensor | NDArray[np.integer],
        prefix_length: int | None = None,
        max_new_tokens: int = 64,
        ignore_eos: bool = False,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> Tokens:
        """Continue token ids (T), yielding token ids. Needs no tokenizer; `.close()` cancels.

        The first `prefix_length` ids see each other both ways, None means all. The token that ends an answer is not
        yielded, unless `ignore_eos` makes it a token like any other. Ends at the end of the context at the latest.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        known = self._check_ids(ids)
        prefix = _check_prefix(prefix_length, len(known))
        request = self._request(known, prefix, max_new_tokens, sampling, ignore_eos)
        return Tokens(request, self._follow(request))

    def logits(self, ids: Sequence[int] | Tensor | NDArray[np.integer], prefix_length: int | None = None) -> Tensor:
        """The logits after every token of ids (T): float32 (T, V). `prefix_length` is as in `tokens`."""
        import torch

        known = self._check_ids(ids)
        return torch.from_numpy(self._runner.logits(known, _check_prefix(prefix_length, len(known))))

    def layers(
        self,
        ids: Sequence[int] | Tensor | NDArray[np.integer],
        prefix_length: int | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> NDArray[np.float32]:
        """What the head would read after the last of ids (T), after each layer of each visit: (cache_slots, V) float32.

        The order is that of `hrmcore.lens_names.places`; the last row is the last of `logits`. `prefix_length` is as in
        `tokens`. `stop` is asked several times a second; when it returns True, Interrupted is raised.
        """
        known = self._check_ids(ids)
        return self._runner.layers(known, _check_prefix(prefix_length, len(known)), stop)

    def _request(
        self, ids: list[int], prefix_length: int, max_new_tokens: int, sampling: Sampling, ignore_eos: bool
    ) -> Request:
        expected = "a whole number of at least 1"
        require(is_integer(max_new_tokens) and max_new_tokens >= 1, "max_new_tokens", expected, max_new_tokens)
        context = self.config.context
        if len(ids) >= context:
            raise ValueError(f"the prompt has {len(ids)} tokens; it must leave room in the context of {context} tokens")
        limit = min(max_new_tokens, context - len(ids))
        ends = {*self.config.eos_token_ids, *([self.tokenizer.eoa] if self.tokenizer else [])}
        return Request(
            ids,
            prefix_length,
            limit,
            at_limit="length" if limit == max_new_tokens else "context",
            ends=frozenset() if ignore_eos else frozenset(ends),
            sampler=Sampler(sampling, ids),
        )

    def _check_ids(self, ids: Sequence[int] | Tensor | NDArray[np.integer]) -> list[int]:
        known = ids if isinstance(ids, Sequence) or not hasattr(ids, "tolist") else ids.tolist()
        whole = isinstance(known, Sequence) and not isinstance(known, str) and all(is_integer(i) for i in known)
        if not whole:
            raise ValueError("ids must be whole numbers: a list, or a one-dimensional tensor or array")
        if not known:
            raise ValueError("ids must hold at least one token, got none")
        vocabulary = self.config.vocab_size
        for position, token in enumerate(known):
            if not 0 <= token < vocabulary:
                raise ValueError(f"ids must be in [0, vocab_size={vocabulary}), got {token} at position {position}")
        self.config.check_length(len(known))
        return [int(token) for token in known]

    def _follow(self, request: Request) -> Generator[int, None, None]:
        with contextlib.closing(self._decode([request])) as run:
            for _, token in run:
                yield token

    def _decode(self, requests: Sequence[Request]) -> Generator[tuple[int, int], None, None]:
        """Decode requests together, yielding (index, token) as tokens come. Closing the generator ends all requests."""
        with contextlib.closing(self.decode(deque(enumerate(requests)))) as run:
            for step in run:
                for index, token in step:
                    if token is not None:
                        yield index, token

    def decode(self, waiting: deque[tuple[Key, Request]]) -> Generator[list[tuple[Key, int | None]], None, None]:
        """Decode what waits, yielding (key, token) of each step's tokens and (key, None) of requests that have left.

        Requests join as others leave; other threads may append to `waiting` and remove from it meanwhile. Anyone may
        end a request by setting its `finish`, from any thread: it leaves before the next step, soon when it is in a
        long prefill, and without a word when it has not begun. Closing the generator ends all that have.
        """
        limits = Limits(MAX_BATCH, CACHE_BUDGET // self._runner.cache_bytes_per_token, PREFILL_TOKENS)
        return Scheduler(self._runner, waiting, limits, self._prefills).run()


def _check_device(device: str) -> None:
    on_cuda = isinstance(device, str) and re.fullmatch(r"cuda(:\d+)?", device) is not None
    require(on_cuda or device == "cpu", "device", "'cpu', 'cuda' or 'cuda:N'", device)


def _check_prefix(prefix_length: int | None, length: int) -> int:
    if prefix_length is None:
        return length
    expected = f"between 0 and the {length} tokens given"
    require(is_integer(prefix_length) and 0 <= prefix_length <= length, "prefix_length", expected, prefix_length)
    return int(prefix_length)


def _check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else stop
    good = isinstance(stops, Sequence) and all(isinstance(text, str) and text for text in stops)
    require(good, "stop", "a non-empty text or a list of them", stop)
    return tuple(stops)


def _find_tokenizer(folder: Path, config: HRMConfig) -> Tokenizer | None:
    try:
        tokenizer = Tokenizer.load(folder)
    except FileNotFoundError:
        return None
    if tokenizer.vocab_size > config.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens, but the model's vocab_size is {config.vocab_size}"
        raise ValueError(f"{tokenizer.source}: the tokenizer has {sizes}")
    return tokenizer
