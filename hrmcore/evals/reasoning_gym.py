"""Tasks of the reasoning-gym package, each scored by the package itself. Needs the extra `demo`."""

from __future__ import annotations

from hrmcore.evals.harness import Question, Task, require_extra


def task(name: str, n: int, seed: int) -> Task:
    """A reasoning-gym dataset as a task. Raises ValueError on a name that the package does not know."""
    require_extra("reasoning_gym", "demo")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise ValueError(f"reasoning_gym has no task {name!r}; it has: {', '.join(sorted(DATASETS))}")
    dataset = reasoning_gym.create_dataset(name, size=n, seed=seed)
    entries = list(dataset)
    questions = tuple(Question(entry["question"].strip(), str(entry["answer"])) for entry in entries)

    def score(index: int, response: str) -> float:
        return float(dataset.score_answer(response.strip(), entries[index]))

    return Task(name, "reasoning_gym", questions, score, scorer="reasoning_gym")
