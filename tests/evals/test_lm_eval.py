"""The real lm-eval, on tasks of local files, against log-probabilities of the model in torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from hrmcore.engine.engine import Engine
from hrmcore.evals.lm_eval import HRMCoreLM
from hrmcore.model import HRM

pytestmark = pytest.mark.usefixtures("one_thread")

DOCUMENTS = [{"question": f"what is {i} plus {i + 1}?", "choices": ["7", "copy", "12 é"]} for i in range(4)]


@pytest.fixture(scope="module")
def lm(checkpoint: Path) -> HRMCoreLM:
    return HRMCoreLM(str(checkpoint), dtype="float32")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def torch_logprob(engine: Engine, known: list[int], response: list[int], prefix: int) -> tuple[float, bool]:
    """Of a response behind known tokens, `prefix` of them seen both ways: from the torch model in float64."""
    model = HRM.from_pretrained(engine.source).requires_grad_(False)
    logits = model(torch.tensor([[*known, *response[:-1]]]), prefix)[0, len(known) - 1 :].double()
    picked = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])
    return float(picked.sum()), logits.argmax(-1).tolist() == response


def test_loglikelihood_is_the_models(lm: HRMCoreLM, engine: Engine) -> None:
    assert engine.tokenizer is not None
    greedy = engine.generate("what is 3 plus 4?", max_new_tokens=3)
    pairs = [("what is 3 plus 4?", " 7"), ("copy\n1 2", "1 2"), ("what is 3 plus 4?", f" {greedy}"), ("", "plus")]
    found = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    tokenizer = engine.tokenizer
    for (context, continuation), (logprob, is_greedy) in zip(pairs, found, strict=True):
        known = [tokenizer.boq, *tokenizer.conditions("direct"), *tokenizer.encode(context), tokenizer.eoq]
        expected = torch_logprob(engine, known, tokenizer.encode(continuation.lstrip()), len(known))
        assert logprob == pytest.approx(expected[0], rel=1e-5)
        assert is_greedy == expected[1]
    assert [is_greedy for _, is_greedy in found] == [False, False, True, False]


def test_a_long_context_loses_its_beginning(lm: HRMCoreLM, engine: Engine) -> None:
    """Whatever stands before what fits has no say; what is left is read to the last token of the context."""
    assert engine.tokenizer is not None
    long = "what is 1 plus 2? " * 600
    assert len(engine.tokenizer.encode(long)) > 2 * 2048
    asked = requests("loglikelihood", (long, " 7"), ("copy " + long, " 7"), (long[:-1], " 7"))
    first, second, third = lm.loglikelihood(asked, disable_tqdm=True)
    assert first == second != third
    options = {"until": [], "max_gen_toks": 4}
    first, second = lm.generate_until(
        requests("generate_until", (long, options), ("copy " + long, options)), disable_tqdm=True
    )
    assert first == second != ""


def test_rolling_loglikelihood_covers_every_token_once(lm: HRMCoreLM, engine: Engine) -> None:
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    opening = [tokenizer.boq, *tokenizer.conditions("direct"), tokenizer.eoq]
    width = 2048 - len(opening)
    short, long = "what is 3 plus 4? é", "what is 1 plus 2? " * 300
    ids = tokenizer.encode(long)
    assert width < len(ids) < 2 * width
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (short,), (long,)), disable_tqdm=True)
    parts = [
        torch_logprob(engine, opening, ids[:width], len(opening))[0],
        torch_logprob(engine, [*opening, ids[width - 1]], ids[width:], len(opening))[0],
    ]
    expected = [torch_logprob(engine, opening, tokenizer.encode(short), len(opening))[0], sum(parts)]
    assert found == pytest.approx(expected, rel=1e-5)


def test_generation_stops_as_it_is_told(lm: HRMCoreLM, engine: Engine) -> None:
    full = engine.generate("what is 3 plus 4?", max_new_tokens=12)
    asked: list[tuple[str, dict[str, Any]]] = [
        ("what is 3 plus 4?", {"until": [full[5:7], ""], "max_gen_toks": 12}),
        ("é", {"max_gen_toks": 5, "until": "no such", "do_sample": False, "temperature": 0.7}),
        ("what is 3 plus 4?", {"max_gen_toks": 12}),
        ("what is 3 plus 4?", {"do_sample": True, "temperature": 0.0, "max_gen_toks": 12}),
    ]
    answers = lm.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert answers == [full[: full.index(full[5:7])], engine.generate("é", max_new_tokens=5), full, full]
    with pytest.raises(ValueError, match="no generation option 'num_beams'"):
        lm.generate_until(requests("generate_until", ("a", {"num_beams": 4})), disable_tqdm=True)


def write_tasks(folder: Path, engine: Engine) -> None:
    """Three tasks on four documents: choices, answers, perplexity. Half of the wanted answers are the model's own."""
    assert engine.tokenizer is not None
    lines = []
    for index, document in enumerate(DOCUMENTS):
        question = str(document["question"])
        prompt = engine.tokenizer.prompt(question)
        scores = [
            torch_logprob(engine, prompt, engine.tokenizer.encode(c), len(prompt))[0] for c in document["choices"]
        ]
        best = scores.index(max(scores))
        answer = engine.generate(question, max_new_tokens=4).strip()
        lines.append(
            {**document, "label": best if index < 3 else (best + 1) % 3, "answer": answer if index < 1 else "no"}
        )
    (folder / "documents.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder / "documents.jsonl"}"}}}}
test_split: test
"""
    kinds = {
        "toy_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}]
""",
        "toy_answer": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {max_gen_toks: 4, do_sample: false, until: ["no such text"]}
filter_list: [{name: stripped, filter: [{function: remove_whitespace}, {function: take_first}]}]
metric_list: [{metric: exact_match}]
""",
        "toy_perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
    }
    for name, text in kinds.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}{common}{text}")


def test_lm_eval_runs_tasks_on_our_engine(checkpoint: Path, engine: Engine, tmp_path: Path) -> None:
    write_tasks(tmp_path, engine)
    result = simple_evaluate(
        "hrmcore",
        model_args=f"path={checkpoint},dtype=float32",
        device="cuda:0",  # what lm-eval's command line hands over when nobody names a device
        tasks=["toy_choice", "toy_answer", "toy_perplexity"],
        task_manager=TaskManager(include_path=tmp_path, include_defaults=False),
        bootstrap_iters=0,
    )
    assert result is not None
    assert result["results"]["toy_choice"]["acc,none"] == 0.75
    assert result["results"]["toy_answer"]["exact_match,stripped"] == 0.25
    assert engine.tokenizer is not None
    opening = [engine.tokenizer.boq, *engine.tokenizer.conditions("direct"), engine.tokenizer.eoq]
    texts = [str(document["question"]) for document in DOCUMENTS]
    total = sum(torch_logprob(engine, opening, engine.tokenizer.encode(t), len(opening))[0] for t in texts)
    expected = -total / sum(len(text.encode()) for text in texts) / math.log(2)
    assert result["results"]["toy_perplexity"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)
