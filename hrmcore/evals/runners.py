"""What answers the questions: our engine, a transformers model, an OpenAI-compatible endpoint. All greedy."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hrmcore.evals.harness import Runner, require_extra

BATCH = 64  # prompts handed over together; the engine decodes as many at a time


class EngineRunner:
    """Our engine: a prompt is a conversation of one message, rendered as when it is served, decoded in batches."""

    def __init__(self, path: str | None, dtype: str, threads: int | None, max_new_tokens: int) -> None:
        from hrmcore.engine.engine import load

        self._engine = load(path, dtype=dtype, threads=threads)
        self._max_new_tokens = max_new_tokens
        self.name = str(path or "the embedded model")
        self._engine.text_tokenizer()

    def answer(self, prompts: Sequence[str], condition: str) -> list[str | None]:
        engine = self._engine
        answers: list[str | None] = [None] * len(prompts)
        context = engine.config.context
        asked = [engine.conversation([{"role": "user", "content": prompt}]) for prompt in prompts]
        lengths = [len(engine.prompt_ids(prompt, condition)) for prompt in asked]
        fitting = [index for index, length in enumerate(lengths) if length < context]
        for chosen in _batches(fitting):
            texts = [asked[index] for index in chosen]
            given = engine.generate(texts, condition=condition, max_new_tokens=self._max_new_tokens)
            for index, answer in zip(chosen, given, strict=True):
                answers[index] = answer
        return answers


class TransformersRunner:
    """A causal language model of the transformers library, from a folder or the hub's local cache.

    An hrm_text checkpoint gets the prompt that our engine gives it. Any other model gets its chat template, if the
    tokenizer has one, else the bare prompt; the condition is left out.
    """

    def __init__(self, path: str, max_new_tokens: int) -> None:
        require_extra("transformers", "bench")
        import torch
        import transformers

        self.name = path
        self._max_new_tokens = max_new_tokens
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model = _pretrained(transformers.AutoModelForCausalLM, path, dtype="auto")
        self._model = model.to(self._device).eval()
        self._framing = None
        if model.config.model_type == "hrm_text":
            from hrmcore.checkpoint.hrm_text import resolve
            from hrmcore.engine.chat_template import ChatTemplate
            from hrmcore.tokenizer import Tokenizer

            self._framing = Tokenizer.load(resolve(path))
            self._template = ChatTemplate.find(resolve(path))
        else:
            self._tokenizer = _pretrained(transformers.AutoTokenizer, path)

    def answer(self, prompts: Sequence[str], condition: str) -> list[str | None]:
        encoded = [self._encode(prompt, condition) for prompt in prompts]
        context = getattr(self._model.config, "max_position_embeddings", None) or float("inf")
        fitting = [index for index, ids in enumerate(encoded) if len(ids) < context]
        fitting.sort(key=lambda index: len(encoded[index]))  # neighbours of like length need little padding
        answers: list[str | None] = [None] * len(prompts)
        for chosen in _batches(fitting):
            for index, answer in zip(chosen, self._generate([encoded[index] for index in chosen]), strict=True):
                answers[index] = answer
        return answers

    def _encode(self, prompt: str, condition: str) -> list[int]:
        messages = [{"role": "user", "content": prompt}]
        if self._framing is not None:
            from hrmcore.engine.chat_template import conversation, prompt_ids

            return prompt_ids(self._framing, conversation(self._template, messages, None), condition)
        if self._tokenizer.chat_template:
            prompt = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return list(self._tokenizer(prompt, add_special_tokens=False)["input_ids"])
        return list(self._tokenizer(prompt)["input_ids"])

    def _generate(self, batch: Sequence[list[int]]) -> list[str]:
        """Greedy continuations, padded on the left so that all answers start together."""
        import torch

        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in batch], device=self._device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch], device=self._device)
        options: dict[str, Any] = {"max_new_tokens": self._max_new_tokens, "do_sample": False, "pad_token_id": 0}
        if self._framing is not None:
            options["token_type_ids"] = mask  # the whole prompt is the bidirectional prefix
            options["eos_token_id"] = self._ends()
        with torch.inference_mode():
            rows = self._model.generate(input_ids=ids, attention_mask=mask, **options)[:, longest:].tolist()
        return [self._decode(row) for row in rows]

    def _ends(self) -> list[int]:
        """The tokens that end an answer of an hrm_text model: the two configurations' and the framing's."""
        assert self._framing is not None
        ends = {self._framing.eoa}
        for config in (self._model.config, self._model.generation_config):
            named = config.eos_token_id
            ends.update(named if isinstance(named, list) else [] if named is None else [named])
        return sorted(ends)

    def _decode(self, ids: list[int]) -> str:
        if self._framing is None:
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))
        end = next((index for index, token in enumerate(ids) if token in self._ends()), len(ids))
        return self._framing.decode_answer(ids[:end])


def _pretrained(kind: Any, path: str, **options: Any) -> Any:
    """What the transformers library loads. Raises ValueError, on one line, whatever it raises on a bad model."""
    try:
        return kind.from_pretrained(path, local_files_only=True, **options)
    except Exception as error:
        if isinstance(error, OSError) and not Path(path).expanduser().is_dir():
            raise ValueError(f"{path}: no such folder, and no such model in the hub's local cache") from None
        why = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path}: transformers cannot load it ({why}); a model of hrmcore runs without --transformers"
        ) from None


class EndpointRunner:
    """An endpoint that speaks OpenAI's chat completions (our own server, vLLM, llama.cpp, a hosted model).

    The key comes from the environment variable OPENAI_API_KEY, where one is needed. Conditions are left out.
    """

    def __init__(self, url: str, model: str, max_new_tokens: int, seed: int) -> None:
        require_extra("openai", "evals")
        import openai

        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--endpoint must be a URL such as http://localhost:8000/v1, got {url!r}")
        self.name = f"{model} at {url}"
        self._url, self._model, self._max_new_tokens, self._seed = url, model, max_new_tokens, seed
        key = os.environ.get("OPENAI_API_KEY", "none")
        self._client = openai.OpenAI(base_url=url, api_key=key, timeout=600, max_retries=2)

    def answer(self, prompts: Sequence[str], condition: str) -> list[str | None]:
        with ThreadPoolExecutor(8) as pool:
            try:
                return list(tqdm(pool.map(self._ask, prompts), total=len(prompts), leave=False, disable=None))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # the first failure speaks for the rest
                raise

    def _ask(self, prompt: str) -> str:
        import openai

        try:
            completion = self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": prompt}],
                max_tokens=self._max_new_tokens,
                temperature=0,
                seed=self._seed,
            )
        except openai.APIConnectionError as error:
            raise ConnectionError(f"{self._url} cannot be reached ({error.__cause__ or error})") from None
        except openai.APIStatusError as error:
            raise ConnectionError(f"{self._url} refused with status {error.status_code}: {error.message}") from None
        except openai.OpenAIError as error:
            raise ConnectionError(f"{self._url}: {error}") from None
        except ValueError as error:
            raise ConnectionError(f"{self._url} sent what is not JSON ({error})") from None
        try:
            content: Any = completion.choices[0].message.content or ""  # None is an answer without words
        except (AttributeError, IndexError, TypeError):  # the client takes whatever JSON comes
            content = None
        if not isinstance(content, str):
            raise ConnectionError(f"{self._url} sent an answer without choices; is it an OpenAI-compatible server?")
        return content


def _batches(indices: Sequence[int]) -> Iterator[Sequence[int]]:
    """Runs of indices, with a progress bar where someone watches."""
    with tqdm(total=len(indices), leave=False, disable=None) as bar:
        for start in range(0, len(indices), BATCH):
            chosen = indices[start : start + BATCH]
            yield chosen
            bar.update(len(chosen))


def make_runner(
    model: str | None,
    transformers: bool,
    endpoint: str | None,
    dtype: str,
    threads: int | None,
    max_new_tokens: int,
    seed: int,
) -> Runner:
    """The runner that the command's arguments ask for. Raises ValueError when they leave out what it needs."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if endpoint is not None:
        if model is None:
            raise ValueError("--endpoint needs --model, the name that the endpoint knows the model by")
        return EndpointRunner(endpoint, model, max_new_tokens, seed)
    if transformers:
        if model is None:
            raise ValueError("--transformers needs --model, a folder or a hub id in the local cache")
        return TransformersRunner(model, max_new_tokens)
    return EngineRunner(model, dtype, threads, max_new_tokens)
