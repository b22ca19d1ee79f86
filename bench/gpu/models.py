"""The checks of bench/gpu/checklist.py that run whole models: the decode step, greedy tokens, a training step.

As in checks.py, on the emulator sizes are toys and nothing is timed.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.gpu.checks import Here, NotRunError, WrongError, packed_lengths, seconds_of
from bench.gpu.decode_step import ALLOWED, Agreement
from hrmcore import machine, optim, planner
from hrmcore.config import HRMConfig
from hrmcore.data.packing import PackedBatch, pack
from hrmcore.data.records import Corpus
from hrmcore.engine.cpu_runner import CpuRunner
from hrmcore.engine.cuda_decode import MOST_REQUESTS, CudaStep, Form
from hrmcore.engine.cuda_runner import CudaRunner
from hrmcore.engine.engine import EMBEDDED_MODEL
from hrmcore.engine.mma_layout import MMA_DTYPES
from hrmcore.model import HRM
from hrmcore.tokenizer import Tokenizer

GREEDY_TOKENS, EMULATED_TOKENS = 64, 3
QUESTION = "What is 3 + 4?"  # its first tokens are decided
BATCHES = (1, 8, 17, 32)  # of the decode step's forms; in several steps where the device takes fewer at once
BATCH_TOKENS, MEAN_LENGTH = 16_384, 297  # of the training step
HORIZONS = (2, 5)
INT8_PROMPTS = (62, 9, 300)  # tokens; the first comes to its second page
INT8_SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_layers_per_stack": 2,
    "num_attention_heads": 4,
    "head_dim": 128,
    "H_cycles": 2,
    "L_cycles": 2,
    "max_position_embeddings": 512,
}
SIZES = ("XL", "L", "B")  # of the model that trains: the first that the memory takes


def toy() -> HRMConfig:
    shape = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 80, "num_layers_per_stack": 1}
    heads = {"num_attention_heads": 3, "head_dim": 16, "H_cycles": 2, "L_cycles": 2, "max_position_embeddings": 512}
    return HRMConfig(**(shape | heads))


def greedy_tokens(here: Here) -> dict[str, Any]:
    """64 greedy tokens of the embedded model: the engine in bfloat16 beside transformers in float32, both fed what
    transformers says, so that every token is compared. They must agree where transformers' best logit leads."""
    try:
        from transformers import HrmTextForCausalLM
    except ImportError:
        raise NotRunError("transformers 5.9 or later, of the extra `bench`, is not installed") from None
    ids = Tokenizer.load(EMBEDDED_MODEL).prompt(QUESTION, "direct")
    prefix = torch.ones(1, len(ids), dtype=torch.int64, device=here.device)
    theirs = HrmTextForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval().to(here.device)
    ours = CudaRunner(
        HRM.from_pretrained(EMBEDDED_MODEL).requires_grad_(False).to(here.device), blocks=2 if here.emulated else 0
    )
    agreement, sequence = Agreement(), torch.tensor([ids], device=here.device)
    with here.kernels(), torch.no_grad():
        handles, found = ours.open([ids], [len(ids)])
        for left in reversed(range(EMULATED_TOKENS if here.emulated else GREEDY_TOKENS)):
            kinds = torch.nn.functional.pad(prefix, (0, sequence.shape[1] - len(ids)))
            expected = theirs(input_ids=sequence, token_type_ids=kinds).logits[0, -1].float().cpu()
            agreement.add(torch.from_numpy(found[0]), expected)
            token = expected.argmax()
            sequence = torch.cat([sequence, token.view(1, 1).to(here.device)], 1)
            if left:
                found = ours.step(handles, [int(token)])
    figures = asdict(agreement)
    if not agreement.error <= ALLOWED:
        raise WrongError(f"logits differ by {agreement.error:.3g} in norm, allowed are {ALLOWED:g}: {figures}")
    if agreement.same_where_decided != agreement.decided:
        raise WrongError(f"other tokens where transformers' best one leads: {figures}")
    return figures


def graph_against_fused_step(here: Here) -> dict[str, Any]:
    """The decode step as a launch a phase and as one cooperative launch: the same bits, at each of BATCHES."""
    config = toy() if here.emulated else HRMConfig.preset("XL")
    torch.manual_seed(6)
    model = HRM(config).requires_grad_(False).to(here.device)
    figures: dict[str, Any] = {"most_requests_of_a_step": MOST_REQUESTS}
    for batch in BATCHES:
        blocks = 3 * batch  # of the cache: 64 rows each
        heads, head_dim = config.num_attention_heads, config.head_dim
        shape = (config.cache_slots, 2, 64 * blocks, heads, head_dim)
        kv = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(here.device, torch.bfloat16)
        tables = torch.arange(blocks, dtype=torch.int32, device=here.device).view(batch, 3)
        positions = 63 + 4 * torch.arange(batch, dtype=torch.int32, device=here.device)
        tokens = torch.arange(1, 1 + batch, dtype=torch.int32, device=here.device)
        seen = {}
        for form in ("graph", "persistent"):
            decode, cache = CudaStep(model, form, blocks=3 if here.emulated else 0), kv.clone()
            call = partial(_in_steps, decode, tokens, positions, tables, cache)
            with here.kernels():
                logits = call()
            if not logits.isfinite().all():
                raise WrongError(f"batch {batch}, {form}: logits that are not finite")
            seen[form] = (logits, cache.view(torch.int16))
            if not here.emulated:
                figures[f"batch_{batch}_{form}_tokens_a_second"] = batch / seconds_of(call)
        if not all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True)):
            raise WrongError(f"batch {batch}: the two forms have other bits")
        figures[f"batch_{batch}"] = "same bits"
    return figures


def int8_cache(here: Here) -> dict[str, Any]:
    """The engine with an int8 cache beside the CPU engine with one: prompts, then tokens over a page's end; and the
    bits of both forms, and of sequences that were kept and forked."""
    torch.manual_seed(6)
    config = toy() if here.emulated else HRMConfig(**INT8_SHAPE)
    model = HRM(config).requires_grad_(False)
    prompts = [torch.randint(0, config.vocab_size, (n,)).tolist() for n in INT8_PROMPTS]
    prefixes, turns = [n // 2 for n in INT8_PROMPTS], 2 if here.emulated else 24
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder))
        cpu = CpuRunner.from_checkpoint(Path(folder), "bfloat16", "int8", None, 0)
    theirs, expected = cpu.open(prompts, prefixes)
    errors, seen = [], {}
    forms: tuple[Form, Form] = ("persistent", "graph")
    for form in forms:
        ours = CudaRunner(
            copy.deepcopy(model).to(here.device), form=form, blocks=3 if here.emulated else 0, kv_dtype="int8"
        )
        with here.kernels():
            handles, found = ours.open(prompts, prefixes)
            rows = [found, *(ours.step(handles, [turn + i for i in range(len(prompts))]) for turn in range(turns))]
            forked = ours.fork(ours.keep(handles[0]))
            both = [ours.step([handle], [1]) for handle in (handles[0], forked)]
        if not np.array_equal(*both):
            raise WrongError(f"{form}: a forked sequence has other logits")
        seen[form] = np.stack(rows)
    if not np.array_equal(*seen.values()):
        raise WrongError("the two forms have other bits")
    for turn, found in enumerate(seen["graph"]):
        errors.append(float(np.linalg.norm(found - expected) / np.linalg.norm(expected)))
        if turn < turns:
            expected = cpu.step(theirs, [turn + i for i in range(len(prompts))])
    if not max(errors) <= ALLOWED:
        raise WrongError(f"logits differ by {max(errors):.3g} in norm, allowed are {ALLOWED:g}: {errors}")
    return {"errors": errors, "bytes_a_token": ours.cache_bytes_per_token}


def every_small_step(here: Here) -> int:
    """A toy's decode step in every form and with every kind of weights, of 1, 8, 9 and 32 requests
    or as many as the device takes; how many."""
    torch.manual_seed(6)
    config, count = toy(), 0
    model = HRM(config).requires_grad_(False).to(here.device)
    shape = (config.cache_slots, 2, 64 * 2 * MOST_REQUESTS, config.num_attention_heads, config.head_dim)
    with here.kernels():
        for form in ("graph", "persistent"):
            for dtype in MMA_DTYPES:
                decode = CudaStep(model, form, 3 if here.emulated else 0, dtype)
                most = decode.most_requests(2)
                for batch in (n for n in (1, 8, 9, MOST_REQUESTS) if n <= most):
                    kv = torch.zeros(shape, dtype=torch.bfloat16, device=here.device)
                    tables = torch.arange(2 * batch, dtype=torch.int32, device=here.device).view(batch, 2)
                    tokens = torch.arange(1, 1 + batch, dtype=torch.int32, device=here.device)
                    if not decode(tokens, 60 + tokens, tables, kv).isfinite().all():
                        raise WrongError(f"{form}, {dtype}, batch {batch}: logits that are not finite")
                    count += 1
    return count


def _in_steps(decode: CudaStep, tokens: Tensor, positions: Tensor, tables: Tensor, kv: Tensor) -> Tensor:
    """Logits (B, V) of any number of requests."""
    most = decode.most_requests(tables.shape[1])
    parts = (x.split(most) for x in (tokens, positions, tables))
    return torch.cat([decode(*part, kv) for part in zip(*parts, strict=True)])


def training_mfu(here: Here) -> dict[str, Any]:
    """A training step's FLOPs a second over those of a large matrix product, in bfloat16, at horizons K = 2 and 5."""
    generator = torch.Generator().manual_seed(8)
    size = None if here.emulated else largest_that_fits(torch.cuda.mem_get_info()[0])
    config = toy() if size is None else HRMConfig.preset(size)
    lengths = packed_lengths(*((3, 12) if here.emulated else (BATCH_TOKENS // MEAN_LENGTH, MEAN_LENGTH)), generator)
    batch, pairs = random_batch(lengths, config.vocab_size)
    torch.manual_seed(9)
    model, batch = HRM(config).to(here.device), batch.to(torch.device(here.device))
    optimizer = optim.AdamAtan2(model.parameters(), lr=1e-3 if here.emulated else 1e-4, ema=0.999)
    peak = None if here.emulated else machine.peak_flops("bfloat16", device=here.device)
    figures: dict[str, Any] = {"model": size or "a toy", "tokens": sum(lengths), "peak_tflops": peak and peak / 1e12}

    def step(horizon: int) -> Tensor:
        with torch.autocast(here.device, dtype=torch.bfloat16, cache_enabled=False):
            loss = model.loss(batch, horizon=horizon) / len(batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    with here.kernels():
        first = float(step(HORIZONS[0]))
        for horizon in HORIZONS:
            flops = planner.training_flops(config, horizon, sum(lengths), len(batch.targets), pairs).total
            seconds = None if here.emulated else seconds_of(partial(step, horizon), 5)
            figures[f"K{horizon}"] = of_peak(flops, sum(lengths), seconds, peak)
        last = float(step(HORIZONS[-1]))
    if not last < first:
        raise WrongError(f"the loss of one batch went from {first:.4g} to {last:.4g} in these steps")
    return figures | {"first_loss": first, "last_loss": last}


def of_peak(flops: float, tokens: int, seconds: float | None, peak: float | None) -> dict[str, float]:
    """The figures of one step; without a time and a peak only its FLOPs a token."""
    figures = {"gflop_a_token": flops / tokens / 1e9}
    if seconds is None or peak is None:
        return figures
    return figures | {
        "tokens_a_second": tokens / seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": flops / seconds / peak,
    }


def largest_that_fits(free: float) -> str:
    """The largest size of SIZES whose training step, with an EMA, takes at most nine tenths of the memory."""
    needs = {}
    for size in SIZES:
        need = planner.memory(HRMConfig.preset(size), max(HORIZONS), BATCH_TOKENS, 0.5, 1, "bfloat16")
        needs[size] = need.peak + need.weights
        if needs[size] <= 0.9 * free:
            return size
    least = min(needs.values())
    raise NotRunError(f"a step of the smallest model takes {least / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def random_batch(lengths: list[int], vocabulary: int) -> tuple[PackedBatch, float]:
    """Records of so many input tokens, half of them the instruction; and the (query, key) pairs that attention sees."""
    offsets, prefixes = np.cumsum([0, *(n + 1 for n in lengths)]), np.array([n // 2 for n in lengths], np.int32)
    tokens = np.random.default_rng(10).integers(vocabulary, size=offsets[-1], dtype=np.int32)
    records = [planner.Record(p, n - p) for n, p in zip(lengths, prefixes.tolist(), strict=True)]
    pairs = sum(record.pairs * n for record, n in zip(records, lengths, strict=True))
    return pack(Corpus(tokens, offsets, prefixes), range(len(lengths))), pairs


CHECKS: dict[str, Callable[[Here], dict[str, Any]]] = {
    "greedy_tokens": greedy_tokens,
    "graph_against_fused_step": graph_against_fused_step,
    "int8_cache": int8_cache,
    "training_mfu": training_mfu,
}
