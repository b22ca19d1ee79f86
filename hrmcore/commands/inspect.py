"""`hrmcore inspect`: which token each cycle and layer would answer (the logit lens): table, JSON, picture or live."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hrmcore import plots
from hrmcore.commands.options import printable, typed_text
from hrmcore.lens_names import token_name, visit_name

if TYPE_CHECKING:
    from hrmcore.lens import Lens
    from hrmcore.model import HRM
    from hrmcore.tokenizer import Tokenizer

EXAMPLE = """\
examples:
  hrmcore inspect "Spell this word backward (example: sun -> nus): lantern"
  hrmcore inspect "State the final answer to the following arithmetic problem: 17 + 25 =" --watch
  hrmcore inspect "What is 17 + 25?" --model checkpoint/ --answer-token 2 --out lens.json --plot lens.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hrmcore inspect`."""
    parser.epilog = EXAMPLE
    parser.add_argument("prompt", type=typed_text, help="the question")
    parser.add_argument("--model", help="checkpoint folder or cached hub id (default: the embedded model)")
    parser.add_argument(
        "--condition",
        default="direct",
        metavar="NAMES",
        help="how to answer: direct, cot, synth, noisy, or several with commas (direct)",
    )
    parser.add_argument(
        "--answer-token", type=int, default=1, metavar="K", help="look at the K-th token of the answer (1)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write what every layer of every visit would answer as JSON"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it as a picture")
    watch = "instead, show live what each cycle would answer, for every token of the answer"
    parser.add_argument("--watch", action="store_true", help=watch)
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer to watch (64)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: all cores)")


def run(args: argparse.Namespace) -> int:
    """Look at one token of the answer to one prompt."""
    if args.answer_token < 1 or args.max_new_tokens < 1:
        raise ValueError("--answer-token and --max-new-tokens must be at least 1")
    if args.out is not None and not args.out.resolve().parent.is_dir():
        raise ValueError(f"{args.out}: no such folder")
    if args.plot is not None:
        plots.check(args.plot)
    model, tokenizer = _load(args.model, args.threads)
    prompt = tokenizer.prompt(args.prompt, args.condition)
    most = args.max_new_tokens if args.watch else args.answer_token
    context = model.config.context
    if len(prompt) + most > context:
        raise ValueError(f"the prompt has {len(prompt)} tokens and leaves no room in the context of {context} tokens")
    if args.watch:
        _watch(model, tokenizer, prompt, most, _rewrite if sys.stdout.isatty() else _append)
        return 0
    report = _report(model, tokenizer, prompt, args)
    print(table(report))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.plot is not None:
        plots.lens(report, args.plot)
    return 0


def _load(path: str | None, threads: int | None) -> tuple[HRM, Tokenizer]:
    import torch

    from hrmcore import _C
    from hrmcore.checkpoint.hrm_text import resolve
    from hrmcore.engine.engine import EMBEDDED_MODEL
    from hrmcore.model import HRM
    from hrmcore.tokenizer import Tokenizer

    if threads is not None:
        if not 1 <= threads <= 1024:
            raise ValueError(f"threads must be from 1 to 1024, got {threads}")
        torch.set_num_threads(threads)
        _C.set_num_threads(threads)
    folder = EMBEDDED_MODEL if path is None else resolve(path)
    return HRM.from_pretrained(folder), Tokenizer.load(folder)


def _report(model: HRM, tokenizer: Tokenizer, prompt: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """What the logit lens sees at the K-th token of the greedy answer, as JSON holds it."""
    from hrmcore.lens import look

    ends = {*model.config.eos_token_ids, tokenizer.eoa}
    answered: list[int] = []
    seen = look(model, prompt, len(prompt))
    while len(answered) < args.answer_token - 1:
        if seen.answer in ends:
            raise ValueError(
                f"the answer ends after {len(answered)} tokens; --answer-token must be at most {len(answered) + 1}"
            )
        answered.append(seen.answer)
        seen = look(model, [*prompt, *answered], len(prompt))
    return {
        "model": str(args.model or "the embedded model"),
        "prompt": args.prompt,
        "condition": args.condition,
        "answered": tokenizer.decode_answer(answered),
        "answer": token_name(tokenizer, seen.answer),
        "H_cycles": model.config.H_cycles,
        "L_cycles": model.config.L_cycles,
        "layers": max(model.config.depths),
        "steps": _steps(tokenizer, seen),
    }


def _steps(tokenizer: Tokenizer, seen: Lens) -> list[dict[str, Any]]:
    return [
        {
            "visit": visit_name(step.h, step.stack, step.l),
            "text": token_name(tokenizer, step.token),
            **dataclasses.asdict(step),
        }
        for step in seen.steps
    ]


def table(report: dict[str, Any]) -> str:
    """What each visit would have answered after its last layer."""
    rows = [("visit", "would answer", "probability", "of the answer", "KL to it", "norm", "change")]
    for step in {step["visit"]: step for step in report["steps"]}.values():  # the last one of each visit
        shares = f"{step['probability']:.1%}", f"{step['answer_probability']:.1%}"
        figures = f"{step['kl']:.3f}", f"{step['norm']:.1f}", f"{step['change']:.2f}"
        rows.append((step["visit"], step["text"], *shares, *figures))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        [
            row[0].ljust(widths[0]),
            row[1].ljust(widths[1]),
            *(t.rjust(w) for t, w in zip(row[2:], widths[2:], strict=True)),
        ]
        for row in rows
    )
    return "\n".join("  ".join(line) for line in lines)


Show = Callable[[str, list[str], bool], None]


def _watch(model: HRM, tokenizer: Tokenizer, prompt: list[int], most: int, show: Show) -> None:
    """Show, for every token of the answer, what each visit would say, as it is computed."""
    from hrmcore.lens import visits

    ends = {*model.config.eos_token_ids, tokenizer.eoa}
    answered: list[int] = []
    while len(answered) < most:
        said: list[str] = []
        for h, l, token, probability in visits(model, [*prompt, *answered], len(prompt)):  # noqa: E741
            visit = visit_name(h, "L" if l < model.config.L_cycles else "H", l)
            said.append(f"{visit} {token_name(tokenizer, token)} {probability:.0%}")
            show(printable(tokenizer.decode_answer(answered)), said, False)
        show(printable(tokenizer.decode_answer(answered)), said, True)
        if token in ends:
            return
        answered.append(token)


def _rewrite(answered: str, said: list[str], last: bool) -> None:
    """On a terminal: one line a token, rewritten as the visits come; only a finished one may take several rows."""
    line = f"{answered[-24:]!r:>28}  " + "  ".join(said)
    columns = shutil.get_terminal_size().columns
    if not last and len(line) >= columns:
        line = "…" + line[2 - columns :]
    print(f"\r\x1b[K{line}", end="\n" if last else "", flush=True)


def _append(answered: str, said: list[str], last: bool) -> None:
    """Elsewhere: the finished line of each token."""
    if last:
        print(f"{answered!r}  " + "  ".join(said), flush=True)
