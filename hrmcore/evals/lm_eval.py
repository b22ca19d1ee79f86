"""Our engine as a model of lm-eval (EleutherAI's evaluation harness), under the name `hrmcore`.

    python -m hrmcore.evals.lm_eval --model hrmcore --model_args path=checkpoint/,dtype=int8 --tasks arc_easy

is lm-eval's own command line with our model registered; `import hrmcore.evals.lm_eval` registers it in a program.
Needs the extra `evals`.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from hrmcore.engine.chat_template import Conversation
from hrmcore.engine.engine import load

MAX_GEN_TOKS = 256  # where a task does not say; lm-eval's own default
_TURNS = "\ufdd1"  # begins a context that holds turns; Unicode sets it aside for such a use


@register_model("hrmcore")
class HRMCoreLM(LM):
    """A context is the instruction, read in both directions; a continuation is the response to it.

    The instruction is rendered as the server renders it: a lone user message, or with lm-eval's --apply_chat_template
    all turns, through the checkpoint's own chat template where it brings one (`Engine.conversation`). The white space
    between context and continuation is left out: framing tokens stand there, and no response in training began with
    white space. A context too long for the model loses the beginning of its last message.
    """

    def __init__(
        self,
        path: str | None = None,
        dtype: str = "auto",
        condition: str = "direct",
        threads: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """Load a checkpoint, None being the embedded model.

        Batch sizes and device have no effect. lm-eval hands them to every model (cuda:0 where nobody names a device),
        but the engine chooses its batches itself and runs on the CPU.
        """
        super().__init__()
        self._engine = load(path, dtype=dtype, threads=threads)
        self._tokenizer = self._engine.text_tokenizer()
        self._condition = condition
        self._opening = [self._tokenizer.boq, *self._tokenizer.conditions(condition), self._tokenizer.eoq]
        self._context = self._engine.config.context

    @property
    def tokenizer_name(self) -> str:
        """What the tokenised requests depend on."""
        return str(self._tokenizer.source)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The turns of a conversation as one context, which the methods below render as the server does."""
        return _TURNS + json.dumps(chat_history, ensure_ascii=False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What lm-eval records of the template: where it is from."""
        prompt = self._engine.conversation([{"role": "user", "content": "?"}])
        return "hrmcore.chat.render" if isinstance(prompt, str) else prompt.template.text

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-probability (nats), and whether greedy decoding gives it."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm):
            context, continuation = request.args
            response = self._tokenizer.encode(continuation.lstrip() or continuation)
            found.append(self._score(self._prompt(context, len(response)), response))
            self.cache_hook.add_partial("loglikelihood", request.args, found[-1])
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """For each (text,): its log-probability (nats) as the response to an empty instruction, in windows if long."""
        found = []
        opening = self._opening
        width = self._context - len(opening)
        for request in tqdm(requests, disable=disable_tqdm):
            ids = self._tokenizer.encode(request.args[0])
            scores = []
            for start in range(0, len(ids), width):
                before = ids[max(0, start - 1) : start]  # a window but the first sees the token before it
                scores.append(self._score([*opening, *before], ids[start : start + width], prefix=len(opening))[0])
            found.append(math.fsum(scores))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """For each (context, options): the answer, up to the first of the stop strings in options["until"]."""
        answers = [""] * len(requests)
        alike: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[repr(request.args[1])].append(index)
        with tqdm(total=len(requests), disable=disable_tqdm) as bar:
            for group in alike.values():
                options = _generation_options(requests[group[0]].args[1])
                room = max(1, self._context - options["max_new_tokens"])
                texts = [self._fitted(requests[index].args[0], room)[0] for index in group]
                given = self._engine.generate(texts, condition=self._condition, **options)
                for index, answer in zip(group, given, strict=True):
                    answers[index] = answer
                    self.cache_hook.add_partial("generate_until", requests[index].args, answer)
                bar.update(len(group))
        return answers

    def _prompt(self, context: str, response_length: int) -> list[int]:
        """The framed context, cut so that the response fits behind it."""
        room = self._context - response_length + 1
        if room < len(self._opening):
            raise ValueError(f"a continuation of {response_length} tokens exceeds the context of {self._context}")
        return self._fitted(context, room)[1] if context.strip() else self._opening

    def _fitted(self, context: str, room: int) -> tuple[str | Conversation, list[int]]:
        """The prompt of a context in at most `room` tokens, and its tokens: its last message loses its beginning."""
        turns = json.loads(context[1:]) if context.startswith(_TURNS) else [{"role": "user", "content": context}]
        prompt = self._engine.conversation(turns)
        ids = self._engine.prompt_ids(prompt, self._condition)
        kept = self._tokenizer.encode(turns[-1]["content"]) if len(ids) > room else []
        while len(ids) > room and len(kept) > 1:
            kept = kept[min(len(ids) - room, len(kept) - 1) :]  # a cut text may take more tokens than it was cut from
            cut = {**turns[-1], "content": self._tokenizer.decode(kept)}
            prompt = self._engine.conversation([*turns[:-1], cut])
            ids = self._engine.prompt_ids(prompt, self._condition)
        return prompt, ids

    def _score(self, known: list[int], predicted: Sequence[int], prefix: int | None = None) -> tuple[float, bool]:
        """Log-probability of the predicted tokens after the known ones, and whether each is the greedy token."""
        ids = [*known, *predicted[:-1]]
        rows = self._engine.logits(ids, prefix_length=len(known) if prefix is None else prefix)
        rows = rows[len(known) - 1 :].double().log_softmax(-1)
        picked = rows[range(len(predicted)), list(predicted)]
        return float(picked.sum()), rows.argmax(-1).tolist() == list(predicted)


def _generation_options(given: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's generation options as `Engine.generate` takes them. Raises ValueError on one that it does not have."""
    options = dict(given)
    until = options.pop("until", None) or []
    stop = [text for text in ([until] if isinstance(until, str) else until) if text]
    limits = [options.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
    heat = options.pop("temperature", None)
    sampled = options.pop("do_sample", bool(heat))
    temperature = 0.0 if not sampled else 1.0 if heat is None else heat
    names = ("top_k", "top_p", "min_p", "repetition_penalty")
    known: dict[str, Any] = {name: options.pop(name) for name in names if name in options}
    if options:
        raise ValueError(f"the engine has no generation option {', '.join(map(repr, options))}")
    most = next((limit for limit in limits if limit is not None), MAX_GEN_TOKS)
    return {"stop": stop or None, "max_new_tokens": int(most), "temperature": float(temperature), **known}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
