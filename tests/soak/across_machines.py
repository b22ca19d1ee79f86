"""The packed bits and logits of one machine beside those of another. Needs numpy alone, so an emulator can run it.

python tests/soak/across_machines.py write FILE      what the strongest instruction set here computes
python tests/soak/across_machines.py compare FILE    every set here beside it

Packed weights must have the same bits. Logits may differ by rounding: within 1e-5 where everything is float32 (sums of
less than 512 terms, 2^-24 each, through eight blocks), and within what the narrower dtype's own rounding costs
elsewhere, as the file says. Within a set, a prompt at once, by the token and in company must give the same bits.
"""

from __future__ import annotations

import hashlib
import sys

import numpy as np
from numpy.typing import NDArray

from hrmcore import _C

WIDTH, FFN, HEADS, HEAD_DIM, VOCABULARY, LENGTH, PREFIX = 129, 200, 3, 64, 131, 70, 20
VARIANTS = [("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "int8"), ("int4", "bfloat16")]
Array = NDArray[np.float32]


def shapes() -> dict[str, tuple[int, ...]]:
    inner = HEADS * HEAD_DIM
    found: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (VOCABULARY, WIDTH),
        "lm_head.weight": (VOCABULARY, WIDTH),
        "z_L_init": (WIDTH,),
    }
    for stack in "LH":
        block = f"{stack}_module.layers.0"
        found[f"{block}.gqkv_proj.weight"] = (4 * inner, WIDTH)
        found[f"{block}.o_proj.weight"] = (WIDTH, inner)
        found[f"{block}.gate_up_proj.weight"] = (2 * FFN, WIDTH)
        found[f"{block}.down_proj.weight"] = (WIDTH, FFN)
    return found


def numbers(shape: tuple[int, ...], seed: int) -> Array:
    """Uniform, with the variance of an initial weight; PCG64 gives the same on any machine."""
    scale = np.float32((3 / shape[-1]) ** 0.5)
    return ((np.random.default_rng(seed).random(shape, dtype=np.float32) * 2 - 1) * scale).astype(np.float32)


def engine(dtype: str, kv_dtype: str) -> _C.Engine:
    angles = np.arange(128)[:, None] * 10000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    core = _C.Engine(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        L_layers=1,
        H_layers=1,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        H_cycles=2,
        L_cycles=2,
        eps=1e-6,
        embedding_scale=WIDTH**0.5,
        rope=np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32),
        dtype=dtype,
        kv_dtype=kv_dtype,
        threads=2,
        cache_tokens=1024,
    )
    core.allocate_weights()
    for seed, (name, shape) in enumerate(shapes().items()):
        core.set_weight(name, numbers(shape, seed))
    return core


def rows(core: _C.Engine, requests: list[int], ids: list[list[int]], every_row: bool) -> Array:
    logits = np.full((sum(map(len, ids)) if every_row else len(ids), VOCABULARY), np.nan, np.float32)
    assert core.step(requests, ids, logits, every_row)
    return logits


def logits_of(core: _C.Engine) -> Array:
    """(LENGTH, V). A prompt at once, by the token, and beside another give the same bits."""
    ids = [int(token) for token in np.random.default_rng(0).integers(0, VOCABULARY, LENGTH)]
    alone, by_token, beside = core.open(PREFIX), core.open(PREFIX), core.open(PREFIX)
    whole = rows(core, [alone], [ids], True)
    steps = [rows(core, [by_token], [ids[:PREFIX]], True)]
    steps += [rows(core, [by_token], [[token]], True) for token in ids[PREFIX:]]
    other = core.open(0)
    together = rows(core, [beside, other], [ids, ids[:33]], True)[:LENGTH]
    for request in (alone, by_token, beside, other):
        core.close(request)
    assert np.array_equal(whole, np.concatenate(steps)), "other bits by the token"
    assert np.array_equal(whole, together), "other bits in company"
    return whole


def distance(ours: Array, theirs: Array) -> float:
    difference = ours.astype(np.float64) - theirs
    return float(np.linalg.norm(difference) / np.linalg.norm(theirs.astype(np.float64)))


def write(path: str) -> None:
    found = {}
    for dtype, kv_dtype in VARIANTS:
        core = engine(dtype, kv_dtype)
        found[dtype] = logits_of(core)
        found[f"{dtype} bits"] = np.frombuffer(hashlib.sha256(core.packed_weights()).digest(), np.uint8)
    np.savez(path, **found)


def compare(path: str) -> None:
    with np.load(path) as file:
        theirs = {name: file[name] for name in file.files}
    faults = []
    for isa in _C.supported_isas():
        _C.set_isa(isa)
        for dtype, kv_dtype in VARIANTS:
            core = engine(dtype, kv_dtype)
            digest = np.frombuffer(hashlib.sha256(core.packed_weights()).digest(), np.uint8)
            cost = distance(theirs[dtype], theirs["float32"])  # of this dtype's rounding
            limit = 1e-5 if dtype == "float32" else cost
            far, same = distance(logits_of(core), theirs[dtype]), np.array_equal(digest, theirs[f"{dtype} bits"])
            print(f"{isa:<8} {dtype:<9} packed bits {'the same' if same else 'OTHER'}, logits {far:.1e} of {limit:.1e}")
            if not same or not far < limit:
                faults.append(f"{isa} {dtype}")
    if faults:
        sys.exit("differs from the other machine: " + ", ".join(faults))


if __name__ == "__main__":
    {"write": write, "compare": compare}[sys.argv[1]](sys.argv[2])
