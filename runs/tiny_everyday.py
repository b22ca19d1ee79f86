"""What people type at a first meeting, as records for the embedded model: sums, words, stories, talk, the unknown.

The puzzles of reasoning-gym have one wording each, and a person does not use it. Every task here has many. Each
generator draws without end from a random source; `records` keeps each instruction once. `heldout=True` draws wordings,
subjects and kinds of question that the training draws never contain. Needs the extra `demo`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import reasoning_gym
from reasoning_gym.data import read_data_file

from hrmcore.data.puzzles import SEED, TASKS

UNKNOWN = "I do not know that."
LONGEST_QUESTION = 220  # characters of a question that the model does not know: longer ones are cut out, not off

Draw = Callable[[random.Random, bool], tuple[str, str]]


def sums(rng: random.Random, heldout: bool) -> tuple[str, str]:
    """Two numbers below 100 added or subtracted, as a person asks; no answer is negative."""
    operation = rng.choice("+-")
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    if operation == "-" and a < b:
        a, b = b, a
    # Held out are pairs of numbers, not wordings: a tenth of them, in both orders and under both operations.
    if heldout != ((min(a, b), max(a, b)) in _HELDOUT_PAIRS):
        return sums(rng, heldout)
    return rng.choice(ASKED).format(rng.choice(TERMS[operation]).format(a=a, b=b)), str(_value(operation, a, b))


def tables(rng: random.Random, heldout: bool) -> tuple[str, str]:
    """The tables up to 12 times 12, and divisions that they answer."""
    operation = rng.choice("*/")
    a, b = rng.randint(0, 12), rng.randint(1, 12)
    term, asked = rng.randrange(len(TERMS[operation])), rng.randrange(len(ASKED))
    # Nobody can tell 7 x 8 from other products, so each is met. Held out are tenths of its wordings.
    if heldout != ((5 * a + 3 * b + term + asked) % 10 == 0):
        return tables(rng, heldout)
    if operation == "/":
        a *= b
    return ASKED[asked].format(TERMS[operation][term].format(a=a, b=b)), str(_value(operation, a, b))


# Drawn, since a rule of digits would keep all pairs of a kind from the training draws.
_HELDOUT_PAIRS = frozenset(random.Random(SEED).sample([(a, b) for b in range(100) for a in range(b + 1)], 505))

TERMS = {
    "+": ("{a} + {b}", "{a}+{b}", "{a} plus {b}", "the sum of {a} and {b}"),
    "-": ("{a} - {b}", "{a}-{b}", "{a} minus {b}"),
    "*": ("{a} * {b}", "{a} x {b}", "{a} times {b}", "{a} multiplied by {b}"),
    "/": ("{a} / {b}", "{a}/{b}", "{a} divided by {b}"),
}
ASKED = ("What is {}?", "what is {}", "What's {}?", "{} = ?", "{} =", "{}", "How much is {}?", "Calculate {}.")


def _value(operation: str, a: int, b: int) -> int:
    if operation == "+":
        return a + b
    if operation == "-":
        return a - b
    return a * b if operation == "*" else a // b


def letters(rng: random.Random, heldout: bool) -> tuple[str, str]:
    """How often a letter occurs in one word; half of the letters occur more than once, where a word has such."""
    word = _word(rng, heldout)
    repeated = [letter for letter in set(word) if word.count(letter) > 1]
    draw = rng.random()
    if repeated and draw < 0.5:
        letter = rng.choice(sorted(repeated))
    else:
        letter = rng.choice(word if draw < 0.85 else "abcdefghijklmnopqrstuvwxyz")
    asked = (
        "How many {l}'s are in {w}?",
        "How many {l}'s are there in {w}?",
        "how many {l} in {w}",
        "How many {l} are in the word {w}?",
        "How often does {l} occur in {w}?",
        'How many times does the letter "{l}" appear in "{w}"?',
        "Count the {l}'s in {w}.",
        "How many {l}s are in {w}?",
        "How many letters {l} are in {w}?",
    )
    return rng.choice(asked).format(l=letter, w=word), str(word.count(letter))


def backward(rng: random.Random, heldout: bool) -> tuple[str, str]:
    """A word spelled backward."""
    word = _word(rng, heldout)
    asked = (
        "Spell {} backward.",
        "spell {} backwards",
        "Reverse the word {}.",
        "reverse {}",
        "What is {} spelled backward?",
        "What is {} backwards?",
        "Write {} from back to front.",
    )
    return rng.choice(asked).format(word), word[::-1]


def stories(rng: random.Random, heldout: bool) -> tuple[str, str]:
    """A word problem of one step, or of two; the things and the people of held-out ones are met in no other."""
    names = ("Anna", "Ben", "Clara", "David", "Ella", "Felix", "Grace", "Hugo", "Ida", "Jonas", "Kate", "Leo", "Mia")
    things = ("apples", "books", "coins", "eggs", "stones", "cards", "pencils", "cakes", "shells", "stamps", "roses")
    new_names, new_things = ("Nina", "Oscar", "Paula", "Tom"), ("marbles", "plums", "keys", "balls")
    name, other = rng.sample(new_names if heldout else names, 2)
    thing = rng.choice(new_things if heldout else things)
    kind = rng.randrange(6)
    a, b, c = rng.randint(2, 40), rng.randint(2, 40), rng.randint(2, 12)
    if kind == 0:
        gets = rng.choice(("buys", "finds", "gets", "wins"))
        return f"{name} has {a} {thing} and {gets} {b} more. How many {thing} does {name} have?", str(a + b)
    if kind == 1:
        a, b = max(a, b), min(a, b)
        gives = rng.choice(("loses", "sells", "eats" if thing in ("apples", "cakes", "eggs", "plums") else "breaks"))
        return f"{name} has {a} {thing} and {gives} {b}. How many {thing} are left?", str(a - b)
    if kind == 2:
        box = rng.choice(("boxes", "bags", "baskets"))
        a = rng.randint(2, 12)
        return f"There are {a} {box} with {c} {thing} each. How many {thing} are there?", str(a * c)
    if kind == 3:
        who = f"{name} has {a} {thing}. {other} has {b} more than {name}."
        return f"{who} How many {thing} does {other} have?", str(a + b)
    if kind == 4:
        a, b = max(a, b), min(a, b)
        who = f"{name} has {a} {thing} and gives {b} of them to {other}."
        return f"{who} How many {thing} does {name} have now?", str(a - b)
    given = rng.randint(1, min(a, 20))
    who = f"{name} has {a} {thing}, buys {c} more and gives {given} to {other}."
    return f"{who} How many {thing} does {name} have?", str(a + c - given)


# answer: ways to ask. The last two of each are held out.
TALK: dict[str, tuple[str, ...]] = {
    "Hello! Ask me for a sum, a word backward or a small sudoku.": (
        *("hello", "hi", "hey", "hello there", "hi there", "good morning", "good evening", "good day", "hey there"),
        *("greetings", "hello hrmcore", "hi hrmcore", "hello model", "hey hrmcore", "good afternoon"),
    ),
    "I am the embedded model of hrmcore, a hierarchical recurrent language model.": (
        *("who are you", "what are you", "tell me who you are", "what is your name", "do you have a name"),
        *("introduce yourself", "tell me about yourself", "say who you are", "what should I call you"),
        *("who is this", "what kind of model are you", "what are you exactly", "so who are you", "who am I talking to"),
        *("tell me what you are", "what is this model"),
    ),
    "I can add, subtract and multiply small numbers, spell words backward, count letters and solve small puzzles.": (
        *("what can you do", "what do you know", "how can you help me", "what are you good at", "help"),
        *("what should I ask you", "what can I ask you", "what are you able to do", "tell me what you can do"),
        *("what questions can you answer", "show me what you can do", "which tasks do you know", "what do you do"),
        *("can you help me", "what can I ask", "tell me what you know"),
    ),
    "I have two million weights. I fit into four megabytes.": (
        *("how large are you", "how big are you", "how many parameters do you have", "how many weights do you have"),
        *("what is your size", "what size are you", "how small are you", "tell me your size", "are you large"),
        *("are you big", "are you small", "how many parameters are you", "how large is this model"),
        *("how big is this model", "how many weights are there in you"),
    ),
    "I have two stacks of layers. A fast one works out details, a slow one plans; both run several times a word.": (
        *("how do you work", "how are you built", "what is inside you", "explain how you work", "how do you think"),
        *("what is your architecture", "tell me how you work", "what does hierarchical mean", "what are your layers"),
        *("how does this model work", "what is hierarchical about you", "how were you built", "how do you answer"),
        *("describe your architecture", "how does your thinking work"),
    ),
    "I was trained from scratch on puzzles and short questions, on two processor cores.": (
        *("how were you trained", "what were you trained on", "how did you learn", "where did you learn that"),
        *("who taught you", "what is your training data", "how long were you trained", "what did you learn from"),
        *("tell me how you were trained", "how did you learn this", "on what were you trained", "who trained you"),
        *("what data were you trained on", "how have you been trained"),
    ),
    "You are welcome.": (
        *("thanks", "thank you", "thank you very much", "thanks a lot", "many thanks", "thx", "thank you so much"),
        *("great, thanks", "ok thanks", "thanks for your help", "thank you for the help", "cheers", "nice, thank you"),
    ),
    "Goodbye!": (
        *("bye", "goodbye", "see you", "see you later", "good night", "bye bye", "I have to go", "farewell", "ciao"),
        *("talk to you later", "that is all, bye", "goodbye hrmcore", "bye for now", "see you soon"),
    ),
    "I am a small program. I have no feelings, but I like sudokus.": (
        *(
            "how are you",
            "how are you doing",
            "are you happy",
            "do you have feelings",
            "how do you feel",
            "are you sad",
        ),
        *("are you alive", "are you human", "are you a person", "how is it going", "do you feel anything"),
        *("are you conscious", "are you well", "how are you today", "are you a human being"),
    ),
    "No. Outside of my few tasks I know nothing, and then I say so.": (
        *("do you know everything", "are you always right", "can I trust you", "do you make mistakes"),
        *("do you know the news", "can you search the internet", "are you chatgpt", "are you as good as chatgpt"),
        *("can you write programs", "do you know facts", "are you a large language model", "do you ever lie"),
        *("can you write code", "are you ever wrong"),
    ),
}


def talk(rng: random.Random, heldout: bool) -> tuple[str, str]:
    """A little about itself; the wordings that are held out are in no training record."""
    answer = rng.choice(tuple(TALK))
    asked = rng.choice(TALK[answer][-2:] if heldout else TALK[answer][:-2])
    first = "" if heldout else rng.choice(("", "", "", "", "Please, ", "Hey, ", "So, ", "Tell me, ", "Ok, "))
    text = first + asked
    if rng.random() < 0.6:
        text = text[0].upper() + text[1:]
    return text + rng.choice(("", "?", ".", "!", "?")), answer


def unknown(rng: random.Random, heldout: bool) -> tuple[str, str]:
    """A question outside of all tasks: general knowledge, numbers too large, another task of reasoning-gym."""
    draw = rng.random()
    if draw < 0.45:
        return _other_task(rng, heldout), UNKNOWN
    if draw < 0.6:
        a, b = rng.randint(200, 10 ** rng.randint(3, 7)), rng.randint(200, 10 ** rng.randint(3, 6))
        asked = (
            "What is {a} {o} {b}?",
            "{a} {o} {b}",
            "{a} {o} {b} =",
            "How much is {a} {o} {b}?",
            "what is {a}{o}{b}",
        )
        return rng.choice(asked).format(a=a, b=b, o=rng.choice("+-*/")), UNKNOWN
    wording = rng.choice(HELDOUT_QUESTIONS if heldout else QUESTIONS)
    text = wording.format(w=_word(rng, heldout), v=_word(rng, heldout), n=rng.randint(2, 2030))
    return (text if rng.random() < 0.6 else text.rstrip("?.").lower()), UNKNOWN


QUESTIONS = (
    *("What is the capital of {w}?", "Who wrote {w}?", "When was {w} born?", "Who is {w}?", "What is {w}?"),
    *("What does {w} mean?", "What is the meaning of {w}?", "Define {w}.", "Explain {w}.", "Explain {w} to a child."),
    *("Write a poem about {w}.", "Write a story about {w} and {v}.", "Write a letter to {w}.", "Tell me a joke."),
    *("Tell me a joke about {w}.", "Tell me about {w}.", "Translate {w} into French.", "How do you say {w} in German?"),
    *("What happened in {n}?", "Who won the {w} prize in {n}?", "Why is the {w} {v}?", "Why do {w} {v}?"),
    *("How do I make {w}?", "How do I cook {w} with {v}?", "Where is {w}?", "Where can I buy {w}?", "How far is {w}?"),
    *("How old is {w}?", "How tall is {w}?", "What is the population of {w}?", "What colour is {w}?"),
    *("Which is better, {w} or {v}?", "What is the difference between {w} and {v}?", "Give me a list of {w}."),
    *("Name three {w}.", "Summarise {w}.", "What rhymes with {w}?", "What is the opposite of {w}?", "Is {w} a {v}?"),
    *("Do you like {w}?", "Can you {w}?", "Should I {w} my {v}?", "What is the weather in {w}?", "What time is it?"),
    *("Write a program that sorts {w}.", "How does {w} work?", "Who invented {w}?", "Who discovered {w}?"),
    *("What is the square root of {n}?", "What is the chemical symbol of {w}?", "How many people live in {w}?"),
    *("{w}", "{w} {v}", "{w}?", "I like {w}.", "My {w} is {v}.", "Please {w} the {v}.", "Recommend a {w}."),
    *("What is the best {w}?", "Is it true that {w} is {v}?", "Plan a trip to {w}.", "What are {w}?", "Draw a {w}."),
)

HELDOUT_QUESTIONS = (
    *("Who painted {w}?", "What is the currency of {w}?", "When did {w} end?", "Who was the king of {w}?"),
    *("Give me a recipe for {w}.", "Write an essay on {w}.", "How long does {w} take?", "What is a {w} made of?"),
    *("Which animal is a {w}?", "In which year was {w} built?", "How heavy is a {w}?", "Sing me a song about {w}."),
    *("Describe {w}.", "What should I do about {w}?", "Who plays {w}?", "How do birds {w}?", "Correct this: {w} {v}"),
)

# Kinds of reasoning-gym that only the held-out questions ask.
HELDOUT_KINDS = (
    *("calendar_arithmetic", "caesar_cipher", "family_relationships", "number_sequence"),
    *("prime_factorization", "syllogism", "word_sorting"),
)
_KINDS = (
    *("ab", "base_conversion", "bitwise_arithmetic", "coin_flip", "count_bits", "count_primes", "countdown"),
    *("decimal_arithmetic", "fraction_simplification", "group_anagrams", "isomorphic_strings", "knights_knaves", "lcm"),
    *("leg_counting", "letter_jumble", "list_functions", "number_filtering", "number_format", "number_sorting"),
    *("palindrome_generation", "polynomial_equations", "power_function", "propositional_logic"),
    *("ransom_note", "sentence_reordering", "simple_equations", "simple_geometry", "simple_integration"),
    *("string_insertion", "time_intervals", "word_ladder", "word_sequence_reversal"),
)
_PER_KIND = 1500
_asked: dict[bool, list[str]] = {}
_words: dict[bool, list[str]] = {}


def _other_task(rng: random.Random, heldout: bool) -> str:
    if heldout not in _asked:
        _asked[heldout] = [
            question
            for kind in (HELDOUT_KINDS if heldout else _KINDS)
            for item in reasoning_gym.create_dataset(kind, size=_PER_KIND, seed=SEED)
            if len(question := item["question"].strip()) <= LONGEST_QUESTION
        ]
    return rng.choice(_asked[heldout])


def _word(rng: random.Random, heldout: bool) -> str:
    """A word of three to ten small letters; every twentieth of them is held out."""
    if not _words:
        drawn = {word.strip() for word in read_data_file("words3to10.txt").splitlines()}
        every = sorted(word for word in drawn if word.isascii() and word.isalpha() and word.islower())
        random.Random(SEED).shuffle(every)
        _words[True], _words[False] = every[: len(every) // 20], every[len(every) // 20 :]
    return rng.choice(_words[heldout])


# task: (records drawn to train on, generator)
EVERYDAY: dict[str, tuple[int, Draw]] = {
    "sums": (250_000, sums),
    "tables": (40_000, tables),
    "letters": (120_000, letters),
    "backward": (20_000, backward),
    "stories": (50_000, stories),
    "talk": (5_000, talk),
    "unknown": (25_000, unknown),
}
assert not EVERYDAY.keys() & TASKS.keys()


def records(task: str, count: int, seed: int, heldout: bool = False) -> Iterator[dict[str, str]]:
    """At most `count` records of one task, each instruction once; fewer where the draws repeat themselves."""
    rng, seen = random.Random(f"{seed} {task} {heldout}"), set()
    for _ in range(4 * count):
        instruction, response = EVERYDAY[task][1](rng, heldout)
        if instruction not in seen:
            seen.add(instruction)
            yield {"instruction": instruction, "response": response, "condition": "direct", "task": task}
        if len(seen) == count:
            return
