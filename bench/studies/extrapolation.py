"""Beyond the training length: RoPE, xPos, xPos with an attention window, trained on 128 tokens, evaluated to 16 times.

python -m bench.studies.extrapolation --out runs/out/extrapolation  # some 15 minutes; what is there is not repeated
python -m bench.studies.extrapolation --toy --out /tmp/toy  # a smoke test, seconds
python -m bench.studies.extrapolation --cost  # only what xPos costs beside RoPE, in three minutes
python -m bench.studies.extrapolation --long  # only how far the engine is off at 65,536 tokens

The text is an endless stream of words from a fixed Markov chain, with facts ("K name value") that are asked for within
100 tokens ("Q name", then the value). Measured: the loss of the same last tokens with more and more context before
them, and how often a fact at a distance is answered, alone among words (chance: 1 in 16). xPos + window is the xPos
model, evaluated with the window: the paper (arXiv 2212.10554) trains without it, too.
The last line printed is the whole result as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

import hrmcore
from bench.intervals import median_with_interval
from hrmcore import HRM, HRMConfig, plots
from hrmcore.data.packing import PackedBatch
from hrmcore.engine.cpu_runner import CpuRunner
from hrmcore.model import Layout

WORDS, NAMES = 32, 16  # words of the chain; names, and as many values
FACT, ASK = WORDS, WORDS + 1
FIRST_NAME, FIRST_VALUE = WORDS + 2, WORDS + 2 + NAMES
VOCABULARY = FIRST_VALUE + NAMES
TRAINED, WINDOW = 128, 64  # tokens; a query then sees 64 to 127 tokens back, as in training
RECENT = 100  # tokens within which a fact is asked for
FORMS = ("rope", "xpos", "xpos+window")


@dataclass(frozen=True)
class Scale:
    """How much is trained and evaluated."""

    steps: int = 1500
    sequences: int = 16  # a step
    width: int = 96
    seeds: int = 3
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    distances: tuple[int, ...] = (16, 32, 64, 96, 128, 192, 256, 512, 1024, 2040)
    streams: int = 64  # evaluated for the loss, and for each distance
    scored: int = 64  # last tokens of each


TOY = Scale(steps=3, sequences=2, width=48, seeds=1, lengths=(128, 256), distances=(16, 192), streams=2, scored=8)


class Text:
    """The stream of words, facts and questions. One chain for all, drawn from a seed of its own."""

    def __init__(self, seed: int) -> None:
        chain = np.random.default_rng(1)
        self._successors = chain.integers(0, WORDS, (WORDS, WORDS, 4))
        self._cumulative = np.cumsum([0.55, 0.25, 0.15, 0.05])
        self._random = np.random.default_rng(seed)

    def words(self, count: int) -> list[int]:
        """Words alone."""
        pair, words = self._random.integers(0, WORDS, 2).tolist(), []
        for draw in self._random.random(count):
            word = int(self._successors[pair[0], pair[1], min(int(np.searchsorted(self._cumulative, draw)), 3)])
            words.append(word)
            pair = [pair[1], word]
        return words

    def stream(self, count: int) -> list[int]:
        """Words with facts and questions."""
        words, tokens = iter(self.words(count)), []
        facts: dict[int, tuple[int, int]] = {}  # name: (value, where)
        while len(tokens) < count:
            draw, at = float(self._random.random()), len(tokens)
            known = [name for name, (_, where) in facts.items() if at - where < RECENT]
            if draw < 0.05:
                name, value = self._random.integers(0, NAMES, 2).tolist()
                facts[name] = (value, at)
                tokens += [FACT, FIRST_NAME + name, FIRST_VALUE + value]
            elif draw < 0.11 and known:
                name = int(self._random.choice(known))
                tokens += [ASK, FIRST_NAME + name, FIRST_VALUE + facts[name][0]]
            else:
                tokens.append(next(words))
        return tokens[:count]

    def question(self, distance: int) -> tuple[list[int], int]:
        """Tokens that end in a question for a fact so many tokens before, and the answer."""
        name, value = self._random.integers(0, NAMES, 2).tolist()
        fact = [*self.words(5), FACT, FIRST_NAME + name, FIRST_VALUE + value]
        return [*fact, *self.words(distance - 2), ASK, FIRST_NAME + name], FIRST_VALUE + value


def shaped(form: str, width: int, ffn: int, layers: int, heads: int, head_dim: int, **others: Any) -> HRMConfig:
    return HRMConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=ffn,
        num_layers_per_stack=layers,
        num_attention_heads=heads,
        head_dim=head_dim,
        position_encoding="rope" if form == "rope" else "xpos",
        attention_window=WINDOW if form == "xpos+window" else 0,
        **others,
    )


def config(form: str, scale: Scale) -> HRMConfig:
    """Of what is trained. RoPE's table is as long as the evaluation needs; all are trained on 128 tokens only."""
    cycles = {"H_cycles": 2, "L_cycles": 2}
    return shaped(form, scale.width, 256, 1, 3, 32, max_position_embeddings=4096, prefix_lm=False, **cycles)


def batch_of(text: Text, scale: Scale, length: int = TRAINED) -> PackedBatch:
    tokens = torch.tensor([text.stream(length + 1) for _ in range(scale.sequences)])
    count = scale.sequences * length
    return PackedBatch(
        ids=tokens[:, :-1].reshape(-1).contiguous(),
        offsets=torch.arange(0, count + 1, length, dtype=torch.int32),
        prefix=torch.zeros(scale.sequences, dtype=torch.int32),
        positions=torch.arange(length, dtype=torch.int32).repeat(scale.sequences),
        supervised=torch.arange(count),
        targets=tokens[:, 1:].reshape(-1).contiguous(),
        records=tuple(range(scale.sequences)),
    )


def train(form: str, seed: int, scale: Scale) -> HRM:
    """One model; the tokens and the first weights depend on the seed alone."""
    torch.manual_seed(seed)
    model, text = HRM(config(form, scale)), Text(1000 + seed)
    optimizer = hrmcore.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    for step in tqdm(range(scale.steps), desc=f"{form} {seed}", disable=None):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 50)
            group["lr"] = 2e-3 * warm * 0.5 * (1 + math.cos(math.pi * step / scale.steps))
        loss = model.loss(batch_of(text, scale), horizon=5) / (scale.sequences * TRAINED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


@torch.no_grad()
def evaluate(model: HRM, scale: Scale) -> dict[str, dict[str, float]]:
    """Loss (nats a token) by context length, and the share of questions answered by distance."""
    text, longest = Text(7), max(scale.lengths)
    streams = torch.tensor([text.stream(longest + 1) for _ in range(scale.streams)])
    losses, answered = {}, {}
    for length in scale.lengths:
        total = 0.0
        for stream in streams:
            logits = model(stream[None, -length - 1 : -1])[0, -scale.scored :]
            total += float(torch.nn.functional.cross_entropy(logits, stream[-scale.scored :]))
        losses[str(length)] = total / len(streams)
    for distance in scale.distances:
        right = 0
        for _ in range(scale.streams):
            ids, answer = text.question(distance)
            right += int(model(torch.tensor([ids]))[0, -1].argmax()) == answer
        answered[str(distance)] = right / scale.streams
    return {"loss": losses, "answered": answered}


def run(out: Path, scale: Scale) -> list[dict[str, Any]]:
    """Train and evaluate what `out` does not hold yet."""
    results = []
    for seed in range(scale.seeds):
        for trained in ("rope", "xpos"):
            folder = out / f"{trained}-{seed}"
            path = folder / "result.json"
            if path.exists():
                kept = json.loads(path.read_text())
                if kept["scale"] != json.loads(json.dumps(asdict(scale))):
                    raise SystemExit(f"{path}: comes from another scale; give another --out")
            else:
                model = train(trained, seed, scale)
                forms = FORMS[:1] if trained == "rope" else FORMS[1:]
                kept = {"scale": asdict(scale), "forms": {}}
                for form in forms:
                    same = HRM(config(form, scale)).eval()
                    same.load_state_dict(model.state_dict())
                    kept["forms"][form] = evaluate(same, scale)
                model.save_pretrained(folder, allow_xpos=True)
                path.write_text(json.dumps(kept) + "\n")
            results += [{"form": form, "seed": seed, **found} for form, found in kept["forms"].items()]
    return results


COMPARED = ("rope", "xpos", "rope")  # the second RoPE shows what a difference of nothing looks like
TOKENS = 5  # decoded in a row, as in an answer: the first of them alone meets caches that another engine has filled


def compare(prepare: Callable[[], list[Callable[[], object]]], rounds: int, seconds: float) -> dict[str, Any]:
    """xPos beside RoPE, and one RoPE beside the other: seconds, and ratios with their 95% intervals.

    A round calls the three that `prepare` makes twice in turn. Never one twice in a row: it would find its own weights
    and keys in the processor's caches, the others theirs displaced. The ratios are medians over rounds, their intervals
    bootstrapped. Takes so many seconds, and prepares anew every so many rounds.
    """
    taken: list[NDArray[np.float64]] = []
    started = time.perf_counter()
    while not taken or time.perf_counter() - started < seconds:
        calls = prepare()
        for call in calls:
            call()  # warms up
        for _ in range(rounds):
            spent = np.zeros(len(calls))
            for which in (0, 1, 2, 0, 1, 2):
                begun = time.perf_counter()
                calls[which]()
                spent[which] += time.perf_counter() - begun
            taken.append(spent / 2)
    rope, xpos, again = np.array(taken).T
    found: dict[str, Any] = {"rope_seconds": float(np.median(rope)), "rounds": len(taken)}
    found["ratio"] = median_with_interval(2 * xpos / (rope + again))
    found["control"] = median_with_interval(again / rope)
    return found


def cost(seconds: float) -> dict[str, dict[str, Any]]:
    """xPos beside RoPE: tokens decoded with an int8 cache at two contexts, each for so long; a training step thrice."""
    torch.manual_seed(0)
    models = [HRM(shaped(form, 256, 768, 2, 4, 64)) for form in COMPARED]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    batch = batch_of(Text(3), Scale(sequences=2), length=256)
    batch.prefix.fill_(100)
    steps = [lambda model=model: model.loss(batch, horizon=5).backward() for model in models]  # type: ignore[misc]
    found = {"training step, 2 x 256 tokens": compare(lambda: steps, 3, 3 * seconds)}
    with tempfile.TemporaryDirectory() as folder:
        for index, model in enumerate(models):
            model.save_pretrained(Path(folder) / str(index), allow_xpos=True)
        engines = [hrmcore.load(Path(folder) / str(i), dtype="int8", kv_dtype="int8") for i in range(len(models))]
    for context in (256, 2048):
        ids: NDArray[np.int64] = np.arange(context) % VOCABULARY

        def answers(ids: NDArray[np.int64] = ids) -> list[Callable[[], object]]:
            streams = [engine.tokens(ids, 100, max_new_tokens=100, ignore_eos=True) for engine in engines]
            return [lambda stream=stream: deque(islice(stream, TOKENS), 0) for stream in streams]  # type: ignore[misc]

        found[f"{TOKENS} decoded tokens, {context} in the cache"] = compare(answers, 100 // TOKENS // 2 - 1, seconds)
    return found


def percent(found: dict[str, float]) -> str:
    return f"{found['median'] - 1:+.1%} (95%: {found['low'] - 1:+.1%} to {found['high'] - 1:+.1%})"


LONG = 65_536  # tokens, as many as an xPos model takes
LONG_UNWINDOWED = 8192  # every token meets every other before it there, which takes too long for more
DECODED = 16  # of them, one at a time after the prefill


def long(tokens: int, unwindowed: int) -> list[dict[str, Any]]:
    """How far the engine's last logits are from the torch model's in float32, over inputs of several lengths.

    An untrained model of 8 visits of a layer, the first half of the input being its prefix. With the window a visit
    reaches at most 127 tokens back, so the last logits depend on the last thousand tokens alone, in both.
    """
    shape = shaped("xpos", 64, 128, 1, 2, 32, max_position_embeddings=TRAINED)
    cases = [(tokens // 16, WINDOW), (tokens, WINDOW), (unwindowed // 16, 0), (unwindowed, 0)]
    found = []
    for dtype, kv_dtype in (("int8", "int8"), ("float32", "float32")):
        for length, window in cases:
            ids = Text(length).stream(length)
            torch.manual_seed(0)
            model = HRM(shape.replace(attention_window=window)).requires_grad_(False)
            model.L_module.layers[0].gqkv_proj.weight *= 2  # or attention would be nearly uniform
            before = peak_memory()
            row, cache = last_logits(model, ids, dtype, kv_dtype)
            taken = peak_memory() - before  # 0 where an earlier case, or the torch model in it, took more
            layout = Layout.of([length], [length // 2])
            exact = model.lm_head(model.hidden(torch.tensor(ids), layout)[-1])
            error = float((torch.from_numpy(row) - exact).norm() / exact.norm())
            same = int(row.argmax()) == int(exact.argmax())
            line = {"dtype": dtype, "kv_dtype": kv_dtype, "tokens": length, "window": window, "error": error}
            found.append(line | {"same_token": same, "cache_bytes": cache, "peak_bytes_more": taken})
            print(json.dumps(found[-1]), flush=True)
    return found


def last_logits(model: HRM, ids: list[int], dtype: str, kv_dtype: str) -> tuple[NDArray[np.float32], int]:
    """The engine's logits after the last token, all but a few prefilled at once; and the bytes of such a cache."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, allow_xpos=True)
        room = 2 * len(ids) * model.config.cache_slots * model.config.attention_width * 4
        runner = CpuRunner.from_checkpoint(Path(folder), dtype, kv_dtype, None, room)
    (handle,), rows = runner.open([ids[:-DECODED]], [len(ids) // 2])
    for token in ids[-DECODED:]:
        rows = runner.step([handle], [token])
    return rows[0], runner.cache_bytes_per_token * len(ids)


def peak_memory() -> int:
    """The most memory this process has held, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def table(results: list[dict[str, Any]], scale: Scale) -> str:
    lines = []
    for key, columns in (("loss", scale.lengths), ("answered", scale.distances)):
        lines.append(f"\n{key:<14}" + "".join(f"{column:>9}" for column in columns))
        for form in FORMS:
            rows = [[found[key][str(column)] for column in columns] for found in results if found["form"] == form]
            means = [statistics.mean(column) for column in zip(*rows, strict=True)]
            lines.append(f"{form:<14}" + "".join(f"{mean:>9.3f}" for mean in means))
            if key == "loss":
                lines.append(f"{'  rise':<14}" + "".join(f"{mean / means[0] - 1:>9.1%}" for mean in means))
            if len(rows) > 1:
                spread = [statistics.stdev(column) for column in zip(*rows, strict=True)]
                lines.append(f"{'  +-':<14}" + "".join(f"{deviation:>9.3f}" for deviation in spread))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/out/extrapolation"), help="default: %(default)s")
    parser.add_argument("--toy", action="store_true", help="a smoke test")
    parser.add_argument("--cost", action="store_true", help="only the cost beside RoPE")
    parser.add_argument("--steps", type=int, default=Scale.steps, help="of training (default: %(default)s)")
    parser.add_argument("--long", action="store_true", help="only the engine's error at 65,536 tokens")
    arguments = parser.parse_args()
    if arguments.long:
        print(json.dumps(long(2048, 512) if arguments.toy else long(LONG, LONG_UNWINDOWED)))
        return 0
    scale = TOY if arguments.toy else Scale(steps=arguments.steps)
    report: dict[str, Any] = {"cost": cost(0 if arguments.toy else 35)}
    for name, line in report["cost"].items():
        seconds, rounds = line["rope_seconds"], line["rounds"]
        print(f"{name}, {rounds} rounds: rope {1e3 * seconds:.3f} ms, xpos {percent(line['ratio'])}")
        print(f"    and rope beside itself {percent(line['control'])}")
    if not arguments.cost:
        arguments.out.mkdir(parents=True, exist_ok=True)
        results = run(arguments.out, scale)
        print(table(results, scale))
        report |= {"trained_at": TRAINED, "window": WINDOW, "scale": asdict(scale), "runs": results}
        (arguments.out / "extrapolation.json").write_text(json.dumps(report, indent=1) + "\n")
        try:
            plots.extrapolation(report, arguments.out / "extrapolation.png")
        except ModuleNotFoundError as error:
            print(f"no picture: {error}")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
