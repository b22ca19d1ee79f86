"""The IQ suite: questions that knowledge cannot answer, generated from a seed (the families of FLM-101B,
arXiv 2309.03852). The same seed gives the same questions on every platform.

Each task has a solver, which sees only the prompt and is always right: the ceiling of the score. Each also lists the
answers among which one would guess who knows the form of the answer, but not the question: the floor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hrmcore.evals.draws import Draws
from hrmcore.evals.harness import Question, Task
from hrmcore.evals.scorers import first_line

CONSONANTS, VOWELS = "bdfghklmnprstvz", "aeiou"
ATTRIBUTES = (
    ("tiny", "small", "large", "huge"),
    ("red", "blue", "green", "yellow"),
    ("circle", "square", "triangle", "star"),
)
SYMBOLS = "#%&*+=@~"
FRUITS = ("apple", "cherry", "fig", "grape", "lemon", "mango", "melon", "peach", "pear", "plum")
PEOPLE = ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack", "Karen", "Leo")
PLACES = ("attic", "bathroom", "bedroom", "cellar", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "ball", "book", "bottle", "key", "lamp", "letter", "milk")

NOISE = (0, 4, 16, 64)  # irrelevant facts in a question of the anti-interference family


@dataclass(frozen=True)
class IQTask:
    """How to make a (prompt, answer) from draws and an amount of noise, how to solve it, what a guesser may say."""

    family: str
    make: Callable[[Draws, int], tuple[str, str]]
    solve: Callable[[str], str]
    candidates: Callable[[str], Sequence[str]]
    noisy: bool = False


def questions(name: str, n: int, seed: int, noise: int = 0) -> tuple[Question, ...]:
    """The first `n` questions of a task. Question i is the same whatever n is."""
    task = TASKS[name]
    made = []
    for index in range(n):
        prompt, answer = task.make(Draws("iq", name, noise, seed, index), noise)
        made.append(Question(prompt, answer, 1 / len(task.candidates(prompt))))
    return tuple(made)


def tasks(name: str, n: int, seed: int, noise: Sequence[int] = NOISE) -> list[Task]:
    """A task as the harness takes it; one for each amount of noise if it takes noise."""
    made = []
    for level in noise if TASKS[name].noisy else (None,):
        asked = questions(name, n, seed, level or 0)
        made.append(Task(name, TASKS[name].family, asked, Match(asked), level, "first_line"))
    return made


@dataclass(frozen=True)
class Match:
    """Scores an answer: its first line must be the right one. What a model says after that does not count."""

    questions: Sequence[Question]

    def __call__(self, index: int, response: str) -> float:
        return float(first_line(response, self.questions[index].answer))


def _word(draws: Draws, syllables: int) -> str:
    return "".join(draws.choice(CONSONANTS) + draws.choice(VOWELS) for _ in range(syllables))


def _words(draws: Draws, count: int, syllables: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_word(draws, syllables)] = None
    return list(found)


def _found(pattern: str, prompt: str) -> str:
    match = re.search(pattern, prompt)
    if match is None:
        raise ValueError(f"the prompt has no {pattern!r}")
    return match[1]


# --- symbolic mapping ----------------------------------------------------------------------------------------------


def _make_mapping(draws: Draws, _: int) -> tuple[str, str]:
    """Three random labels stand for three values of one attribute; the examples rule out the other attributes."""
    labels = _words(draws, 3, 2)
    deciding = draws.below(len(ATTRIBUTES))
    values = draws.sample(ATTRIBUTES[deciding], 3)

    def describe(which: int) -> tuple[str, ...]:
        drawn = [draws.choice(attribute) for attribute in ATTRIBUTES]
        drawn[deciding] = values[which]
        return tuple(drawn)

    while True:
        examples = draws.shuffled([(describe(which), labels[which]) for which in (0, 1, 2) * 3])
        if [a for a in range(len(ATTRIBUTES)) if _labels_by(a, examples)] == [deciding]:
            break
    which = draws.below(len(labels))
    lines = [
        "Every description has a label. One property decides which. Learn it from the examples.",
        *(f"{' '.join(words)} -> {label}" for words, label in examples),
        f"What is the label of: {' '.join(describe(which))}",
        "Answer with the label alone.",
    ]
    return "\n".join(lines), labels[which]


def _labels_by(attribute: int, examples: Sequence[tuple[Sequence[str], str]]) -> dict[str, str] | None:
    """The label of each value of an attribute; None when the examples contradict it."""
    labels: dict[str, str] = {}
    for words, label in examples:
        if labels.setdefault(words[attribute], label) != label:
            return None
    return labels


def _mapping_examples(prompt: str) -> list[tuple[list[str], str]]:
    return [(words.split(), label) for words, label in re.findall(r"^(.+) -> (.+)$", prompt, re.MULTILINE)]


def _solve_mapping(prompt: str) -> str:
    examples = _mapping_examples(prompt)
    asked = _found(r"label of: (.+)", prompt).split()
    [labels] = [found for a in range(len(asked)) if (found := _labels_by(a, examples))]
    return next(label for value, label in labels.items() if value in asked)


def _mapping_candidates(prompt: str) -> list[str]:
    return sorted({label for _, label in _mapping_examples(prompt)})


# --- rule understanding --------------------------------------------------------------------------------------------


def _make_counting(draws: Draws, _: int) -> tuple[str, str]:
    asked, *others = draws.shuffled(FRUITS)
    count, length = draws.between(0, 5), draws.between(6, 12)
    words = draws.shuffled([asked] * count + [draws.choice(others) for _ in range(length - count)])
    prompt = f'How many times is "{asked}" in this list? Answer with the number alone.\n{" ".join(words)}'
    return prompt, str(count)


def _solve_counting(prompt: str) -> str:
    return str(prompt.splitlines()[1].split().count(_found(r'is "(\w+)"', prompt)))


def _counting_candidates(prompt: str) -> list[str]:
    return [str(count) for count in range(len(prompt.splitlines()[1].split()) + 1)]


def _make_replacement(draws: Draws, _: int) -> tuple[str, str]:
    letters = draws.sample(CONSONANTS + VOWELS, 6)
    text = "".join(draws.choice(letters[:5]) for _ in range(draws.between(6, 10)))
    old, new = draws.choice(text), letters[5]
    prompt = f'Write the text again with every "{old}" replaced by "{new}". Answer with the new text alone.\n{text}'
    return prompt, text.replace(old, new)


def _solve_replacement(prompt: str) -> str:
    old, new = re.findall(r'"(\w)"', prompt)
    return prompt.splitlines()[1].replace(old, new)


def _replacement_candidates(prompt: str) -> list[str]:
    text, new = prompt.splitlines()[1], _found(r'by "(\w)"', prompt)
    return [text.replace(old, new) for old in sorted(set(text))]


# --- pattern mining ------------------------------------------------------------------------------------------------


def _make_pattern(draws: Draws, rule: Callable[[str], str]) -> tuple[str, str]:
    """Three examples of a rule, and a fourth input."""
    *examples, asked = (_word(draws, 4)[: draws.between(5, 8)] for _ in range(4))
    lines = [line for text in examples for line in (f"Input: {text}", f"Output: {rule(text)}")]
    head = "Find the rule that turns each input into its output. Answer with the last output alone."
    return "\n".join([head, *lines, f"Input: {asked}", "Output:"]), rule(asked)


def _pattern(prompt: str) -> tuple[str, str, str]:
    """An example's input and output, and the input asked for."""
    inputs = re.findall(r"^Input: (.+)$", prompt, re.MULTILINE)
    return inputs[0], _found(r"Output: (.+)", prompt), inputs[-1]


def _make_wrap(draws: Draws, _: int) -> tuple[str, str]:
    head, tail = draws.choice(SYMBOLS), draws.choice(SYMBOLS)
    return _make_pattern(draws, lambda text: head + text + tail)


def _solve_wrap(prompt: str) -> str:
    _, wrapped, asked = _pattern(prompt)
    return wrapped[0] + asked + wrapped[-1]


def _wrap_candidates(prompt: str) -> list[str]:
    asked = _pattern(prompt)[2]
    return [head + asked + tail for head in SYMBOLS for tail in SYMBOLS]


def _make_repeating(draws: Draws, _: int) -> tuple[str, str]:
    times = draws.between(2, 4)
    return _make_pattern(draws, lambda text: text * times)


def _solve_repeating(prompt: str) -> str:
    text, repeated, asked = _pattern(prompt)
    return asked * (len(repeated) // len(text))


def _repeating_candidates(prompt: str) -> list[str]:
    return [_pattern(prompt)[2] * times for times in (2, 3, 4)]


def _make_slicing(draws: Draws, _: int) -> tuple[str, str]:
    kept = draws.between(1, 4)
    return _make_pattern(draws, lambda text: text[:kept])


def _solve_slicing(prompt: str) -> str:
    _, head, asked = _pattern(prompt)
    return asked[: len(head)]


def _slicing_candidates(prompt: str) -> list[str]:
    asked = _pattern(prompt)[2]
    return [asked[:kept] for kept in range(1, len(asked) + 1)]


# --- anti-interference ---------------------------------------------------------------------------------------------


def _make_keys(draws: Draws, noise: int) -> tuple[str, str]:
    """One key among `noise` others."""
    keys = _words(draws, noise + 1, 3)
    values: dict[str, None] = {}
    while len(values) < len(keys):
        values[str(draws.between(1000, 9999))] = None
    pairs = list(zip(keys, values, strict=True))
    asked, value = draws.choice(pairs)
    lines = [f"The value of {key} is {number}." for key, number in pairs]
    return "\n".join([*lines, f"What is the value of {asked}? Answer with the value alone."]), value


def _solve_keys(prompt: str) -> str:
    key = _found(r"What is the value of (\w+)", prompt)
    return _found(rf"The value of {key} is (\d+)", prompt)


def _key_candidates(prompt: str) -> list[str]:
    return re.findall(r"is (\d+)\.", prompt)


def _went(person: str, place: str) -> str:
    return f"{person} went to the {place}."


def _story(draws: Draws, who: str, facts: Sequence[str], noise: int, distraction: Callable[[], str]) -> list[str]:
    """The facts in their order among `noise` others, of which some tell where `who` was before the last fact."""
    places = sorted(draws.sample(range(len(facts) + noise), len(facts)))
    left = iter(facts)
    lines = []
    for index in range(len(facts) + noise):
        if index in places:
            lines.append(next(left))
        elif index < places[-1] and draws.below(4) == 0:
            lines.append(_went(who, draws.choice(PLACES)))
        else:
            lines.append(distraction())
    return lines


def _make_one_fact(draws: Draws, noise: int) -> tuple[str, str]:
    who, *others = draws.shuffled(PEOPLE)
    place = draws.choice(PLACES)
    lines = _story(draws, who, [_went(who, place)], noise, lambda: _went(draws.choice(others), draws.choice(PLACES)))
    return "\n".join([*lines, f"Where is {who}? Answer with the place alone, as in: {PLACES[0]}"]), place


def _solve_one_fact(prompt: str) -> str:
    return _last_place(_found(r"Where is (\w+)\?", prompt), prompt)


def _last_place(person: str, prompt: str) -> str:
    return re.findall(rf"^{person} went to the (\w+)\.$", prompt, re.MULTILINE)[-1]


def _make_two_facts(draws: Draws, noise: int) -> tuple[str, str]:
    who, *others = draws.shuffled(PEOPLE)
    thing, *things = draws.shuffled(THINGS)
    place = draws.choice(PLACES)

    def distraction() -> str:
        person = draws.choice(others)
        return _went(person, draws.choice(PLACES)) if draws.below(2) else f"{person} took the {draws.choice(things)}."

    lines = _story(draws, who, [f"{who} took the {thing}.", _went(who, place)], noise, distraction)
    return "\n".join([*lines, f"Where is the {thing}? Answer with the place alone, as in: {PLACES[0]}"]), place


def _solve_two_facts(prompt: str) -> str:
    thing = _found(r"Where is the (\w+)\?", prompt)
    return _last_place(_found(rf"(\w+) took the {thing}\.", prompt), prompt)


def _place_candidates(_: str) -> Sequence[str]:
    return PLACES


TASKS = {
    "attribute_mapping": IQTask("symbolic_mapping", _make_mapping, _solve_mapping, _mapping_candidates),
    "counting": IQTask("rule_understanding", _make_counting, _solve_counting, _counting_candidates),
    "string_replacement": IQTask("rule_understanding", _make_replacement, _solve_replacement, _replacement_candidates),
    "head_and_tail": IQTask("pattern_mining", _make_wrap, _solve_wrap, _wrap_candidates),
    "full_repeating": IQTask("pattern_mining", _make_repeating, _solve_repeating, _repeating_candidates),
    "head_slicing": IQTask("pattern_mining", _make_slicing, _solve_slicing, _slicing_candidates),
    "key_retrieval": IQTask("anti_interference", _make_keys, _solve_keys, _key_candidates, noisy=True),
    "one_supporting_fact": IQTask("anti_interference", _make_one_fact, _solve_one_fact, _place_candidates, noisy=True),
    "two_supporting_facts": IQTask(
        "anti_interference", _make_two_facts, _solve_two_facts, _place_candidates, noisy=True
    ),
}
FAMILIES = tuple(dict.fromkeys(task.family for task in TASKS.values()))
