# Written by cmake/make_stub.py from the built module (`make stub`); the signatures are stated in csrc/bindings/.
from collections.abc import Sequence
from typing import Protocol

class Tensor(Protocol):
    """Any DLPack producer, or a capsule of one."""

    def __dlpack__(self) -> object: ...

Output = Tensor  # written

max_batch: int
multiply_add_width: int
page_tokens: int
stream_block: int

class Engine:
    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        L_layers: int,
        H_layers: int,
        num_heads: int,
        head_dim: int,
        H_cycles: int,
        L_cycles: int,
        eps: float,
        embedding_scale: float,
        rope: Tensor,
        dtype: str,
        kv_dtype: str,
        threads: int,
        cache_tokens: int,
        log_decay: Tensor | None = None,
        window: int = 0,
    ) -> None: ...
    def allocate_weights(self) -> None: ...
    def begin(self, requests: Sequence[int], ids: Sequence[Sequence[int]]) -> Step: ...
    @property
    def cache_pages(self) -> int: ...
    @property
    def cache_pages_used(self) -> int: ...
    def checksum(self) -> int: ...
    def close(self, request: int) -> None: ...
    def fork(self, kept: int) -> int: ...
    def get_weight(self, name: str, out: Output) -> None: ...
    def keep(self, request: int) -> int: ...
    def map_weights(self, path: str, offset: int, checksum: int) -> None: ...
    def open(self, prefix_length: int) -> int: ...
    @property
    def open_requests(self) -> int: ...
    def packed_weights(self) -> memoryview: ...
    def rewind(self, request: int, length: int) -> None: ...
    def set_weight(self, name: str, tensor: Tensor) -> None: ...
    def step(
        self,
        requests: Sequence[int],
        ids: Sequence[Sequence[int]],
        logits: Output,
        every_row: bool,
        stop: object = None,
        every_layer: bool = False,
    ) -> bool: ...
    @property
    def threads(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...

class PrefetchTrial:
    def __init__(self) -> None: ...
    def begin(self, tokens: int) -> bool: ...
    @property
    def decided(self) -> bool: ...
    def end(self, nanoseconds: int) -> None: ...

class Sampler:
    def __init__(
        self,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        seed: int,
        prompt: Sequence[int],
    ) -> None: ...
    def accept(self, token: int) -> None: ...
    @property
    def draws(self) -> int: ...
    @property
    def seen(self) -> list[int]: ...

class Step:
    @property
    def halves(self) -> int: ...
    @property
    def halves_done(self) -> int: ...
    def run(self, logits: Output, tokens: int, stop: object = None) -> bool | None: ...
    @property
    def tokens(self) -> int: ...

def adam_atan2_paper_step(
    numbers: Sequence[int],
    params: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor | None],
    exp_avg_sqs: Sequence[Tensor | None],
    emas: Sequence[Tensor | None],
    steps: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    ema_decay: float,
    grad_scale: Tensor | None,
    stream: int = 0,
) -> None: ...
def adam_atan2_step(
    numbers: Sequence[int],
    params: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor | None],
    exp_avg_sqs: Sequence[Tensor | None],
    emas: Sequence[Tensor | None],
    steps: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    ema_decay: float,
    grad_scale: Tensor | None,
    stream: int = 0,
) -> None: ...
def adamw_step(
    numbers: Sequence[int],
    params: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor | None],
    exp_avg_sqs: Sequence[Tensor | None],
    emas: Sequence[Tensor | None],
    steps: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    ema_decay: float,
    grad_scale: Tensor | None,
    stream: int = 0,
) -> None: ...
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    offsets: Tensor,
    key_offsets: Tensor,
    prefix: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_q: Output,
    grad_k: Output,
    grad_v: Output,
    grad_gate: Output,
    log_decay: Tensor | None,
    window: int,
    tiles: Tensor | None,
    ungated: Output | None,
    row_terms: Output | None,
    table: Tensor | None,
    positions: Tensor | None,
    stream: int = 0,
) -> None: ...
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    offsets: Tensor,
    key_offsets: Tensor,
    prefix: Tensor,
    out: Output,
    lse: Output,
    log_decay: Tensor | None,
    window: int,
    tiles: Tensor | None,
    stream: int = 0,
) -> None: ...
def attention_table(
    *,
    offsets: Tensor,
    key_offsets: Tensor,
    prefix: Tensor,
    query_rows: int,
    key_rows: int,
    window: int,
    tiles: Output,
    stream: int,
) -> None: ...
def cross_entropy_backward(logits: Output, targets: Tensor, lse: Tensor, scale: Tensor, stream: int = 0) -> None: ...
def cross_entropy_forward(logits: Tensor, targets: Tensor, losses: Output, lse: Output, stream: int = 0) -> None: ...
def cuda_draw(
    *,
    logits: Tensor,
    fed: Tensor,
    slots: Tensor,
    drawn: Output,
    positions: Output,
    options: Tensor,
    counts: Output,
    seen: Output,
    stream: int,
) -> None: ...
def cuda_packed_product(
    *,
    x: Tensor,
    weights: Tensor,
    out: Output,
    pieces: int,
    gated: bool,
    dtype: str,
    processors: int,
    stream: int,
) -> None: ...
def cuda_rotate_append(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    positions: Tensor,
    rows: Tensor,
    q_out: Output,
    k_out: Output,
    keys: Output,
    values: Output,
    stream: int,
) -> None: ...
def cuda_step(
    *,
    tokens: Tensor,
    positions: Tensor,
    tables: Tensor,
    kv: Output,
    embedding: Tensor,
    z_init: Tensor,
    rope: Tensor,
    log_decay: Tensor | None,
    weights: Tensor,
    logits: Output,
    workspace: Output,
    ffn: int,
    L_layers: int,
    H_layers: int,
    H_cycles: int,
    L_cycles: int,
    eps: float,
    embedding_scale: float,
    window: int,
    dtype: str,
    persistent: bool,
    blocks: int,
    stream: int,
) -> None: ...
def cuda_step_most_requests(
    *,
    width: int,
    ffn: int,
    heads: int,
    head_dim: int,
    xpos: bool,
    int8_cache: bool,
    window: int,
    table_length: int,
    dtype: str,
    blocks: int,
    device: int = 0,
) -> int: ...
def cuda_step_workspace_bytes(width: int, ffn: int, heads: int, head_dim: int) -> int: ...
def emulate_cuda(path: str) -> None: ...
def emulating_cuda() -> bool: ...
def isa() -> str: ...
def log_probabilities(logits: Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[list[tuple[int, float]]]: ...
def multiply_add(sums: Output, rounds: int) -> None: ...
def num_threads() -> int: ...
def page_bytes(kv_dtype: str, slots: int, heads: int, head_dim: int) -> int: ...
def philox4x64(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def rms_norm_backward(
    u: Tensor,
    grad_y: Tensor,
    grad_sum: Tensor | None,
    grad_u: Output,
    eps: float,
    stream: int = 0,
) -> None: ...
def rms_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    y: Output,
    sum: Output | None,
    eps: float,
    stream: int = 0,
) -> None: ...
def rms_norm_inject_backward(
    state: Tensor,
    sum: Tensor,
    scale: Tensor,
    grad_state: Tensor | None,
    grad_y: Tensor,
    grad_sum: Tensor | None,
    grad_u: Output,
    grad_injection: Output | None,
    eps: float,
    stream: int = 0,
) -> None: ...
def rms_norm_inject_forward(
    x: Tensor,
    residual: Tensor,
    injection: Tensor,
    state: Output,
    y: Output,
    sum: Output,
    scale: Output,
    eps: float,
    stream: int = 0,
) -> None: ...
def rope(
    q: Tensor,
    k: Tensor,
    table: Tensor,
    positions: Tensor,
    q_out: Output,
    k_out: Output,
    inverse: bool,
    stream: int = 0,
) -> None: ...
def sample(samplers: Sequence[Sampler], logits: Tensor) -> list[int]: ...
def set_isa(name: str) -> None: ...
def set_num_threads(threads: int) -> None: ...
def sophia_curvature(
    numbers: Sequence[int],
    hessians: Sequence[Tensor | None],
    probes: Sequence[Tensor | None],
    hvps: Sequence[Tensor | None],
    beta2: float,
    stream: int = 0,
) -> None: ...
def sophia_step(
    numbers: Sequence[int],
    params: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor | None],
    hessians: Sequence[Tensor | None],
    emas: Sequence[Tensor | None],
    clipped: Output,
    lr: float,
    beta1: float,
    weight_decay: float,
    rho: float,
    batch_tokens: float,
    eps: float,
    ema_decay: float,
    grad_scale: Tensor | None,
    stream: int = 0,
) -> None: ...
def stream_copy(source: Tensor, target: Output) -> None: ...
def stream_read(source: Tensor, sums: Output) -> None: ...
def supported_isas() -> list[str]: ...
def swiglu_backward(ab: Tensor, grad_y: Tensor, grad_ab: Output, y: Output | None, stream: int = 0) -> None: ...
def swiglu_forward(ab: Tensor, y: Output, stream: int = 0) -> None: ...
