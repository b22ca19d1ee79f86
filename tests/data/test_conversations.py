"""A conversation of several turns: what it becomes, packed, masked and charged, and that this is what is served.

The model, its mask and its loss are written out here in float64, from the formulas of docs/design/model.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.records import Prepare, lines
from torch import Tensor

from hrmcore.config import HRMConfig
from hrmcore.data.packing import pack
from hrmcore.engine.engine import load
from hrmcore.model import HRM
from hrmcore.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello <eoa>"},
    {"role": "assistant", "content": "Hi. <eoq>"},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "What is 2 + 1?"},
    {"role": "assistant", "content": "3"},
]
# Written out by hand: the instruction and the answer of each assistant turn.
TURNS = [
    ("Be brief.\n\nUser: Hello <eoa>", "Hi. <eoq>"),
    ("Be brief.\n\nUser: Hello <eoa>\n\nAssistant: Hi. <eoq>\n\nUser: What is 1 + 1?", "2"),
    (
        "Be brief.\n\nUser: Hello <eoa>\n\nAssistant: Hi. <eoq>\n\nUser: What is 1 + 1?"
        "\n\nAssistant: 2\n\nUser: What is 2 + 1?",
        "3",
    ),
]


@pytest.fixture(scope="module")
def model(tokenizer: Path) -> HRM:
    torch.manual_seed(0)
    ids = Tokenizer.load(tokenizer)
    config = HRMConfig(
        vocab_size=ids.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers_per_stack=2,
        num_attention_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        eos_token_id=ids.eoa,
    )
    return HRM(config)


def logits(model: HRM, ids: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
    """float64 logits (T, V) of tokens at these positions, of which token i sees those j where visible[i, j]."""
    config = model.config
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    heads, channels, half = config.num_attention_heads, config.head_dim, config.head_dim // 2
    angles = positions.double()[:, None] * config.rope_theta ** (-torch.arange(half).double() / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]

    def rms(u: Tensor) -> Tensor:
        return u / (u.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def rotated(x: Tensor) -> Tensor:
        first, second = x.split(half, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def block(u: Tensor, name: str) -> Tensor:
        gate, q, k, v = (rms(u) @ weights[f"{name}.gqkv_proj.weight"].T).view(-1, 4, heads, channels).unbind(1)
        scores = torch.einsum("ihd,jhd->hij", rotated(q), rotated(k)) / channels**0.5
        shares = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        attended = torch.einsum("hij,jhd->ihd", shares, v) * gate.sigmoid()
        u = u + attended.flatten(1) @ weights[f"{name}.o_proj.weight"].T
        a, b = (rms(u) @ weights[f"{name}.gate_up_proj.weight"].T).chunk(2, -1)
        return u + (a * a.sigmoid() * b) @ weights[f"{name}.down_proj.weight"].T

    def stack(u: Tensor, name: str) -> Tensor:
        for layer in range(config.num_layers_per_stack):
            u = block(u, f"{name}.layers.{layer}")
        return rms(u)

    slow = config.embedding_scale * weights["embed_tokens.weight"][ids]
    fast = weights["z_L_init"].expand_as(slow)
    for _ in range(config.H_cycles):
        for _ in range(config.L_cycles):
            fast = stack(fast + slow, "L_module")
        slow = stack(slow + fast, "H_module")
    return slow @ weights["lm_head.weight"].T


def rendered(tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """Prefix and answer of each turn, in token ids."""
    boq, direct, eoq, eoa = (tokenizer.backend.token_id(f"<{name}>") for name in ("boq", "direct", "eoq", "eoa"))
    return [
        ([boq, direct, *tokenizer.encode(instruction), eoq], [*tokenizer.encode(answer), eoa])
        for instruction, answer in TURNS
    ]


def test_packing_mask_and_loss_are_the_float64_rendering(
    model: HRM, prepared: Prepare, tokenizer: Path, tmp_path: Path
) -> None:
    store = prepared(lines(tmp_path / "chat.jsonl", [{"messages": CHAT}]))
    turns = rendered(Tokenizer.load(tokenizer))
    batch = pack(store.corpus, range(len(store.corpus)), multiple=64)

    # One sequence after the other; the last token of each is only a target.
    sequences = [[*prefix, *answer][:-1] for prefix, answer in turns]
    ids = [token for sequence in sequences for token in sequence]
    padding = -len(ids) % 64
    assert batch.ids.tolist() == ids + padding * [0]
    owners = [(turn, position) for turn, sequence in enumerate(sequences) for position in range(len(sequence))]
    assert batch.positions.tolist() == [position for _, position in owners] + list(range(padding))

    # Key j is visible to query i iff both are of one sequence and j lies in its prefix or not after i.
    visible = torch.tensor(
        [[t == s and (j < len(turns[t][0]) or j <= i) for s, j in owners] for t, i in owners], dtype=torch.bool
    )
    exact = logits(model, torch.tensor(ids), visible, torch.tensor([position for _, position in owners]))
    # The last token of a prefix predicts the first of the answer; loss on answers and their eoa alone.
    targets = {
        owners.index((turn, len(prefix) - 1 + number)): token
        for turn, (prefix, answer) in enumerate(turns)
        for number, token in enumerate(answer)
    }
    assert dict(zip(batch.supervised.tolist(), batch.targets.tolist(), strict=True)) == targets
    loss = -sum(float(exact[row].log_softmax(-1)[token]) for row, token in targets.items())
    assert model.loss(batch).item() == pytest.approx(loss, rel=1e-5)

    everything = torch.tensor([[t == s for s, _ in owners] for t, _ in owners], dtype=torch.bool)
    leaky = logits(model, torch.tensor(ids), everything, torch.tensor([position for _, position in owners]))
    other = -sum(float(leaky[row].log_softmax(-1)[token]) for row, token in targets.items())
    assert abs(other - loss) > 1e-3 * loss  # another mask would be seen


def test_what_is_trained_is_what_is_served(model: HRM, tokenizer: Path, prepared: Prepare, tmp_path: Path) -> None:
    store = prepared(lines(tmp_path / "chat.jsonl", [{"messages": CHAT}]))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    engine, corpus = load(folder), store.corpus
    for turn, last in enumerate((2, 4, 6)):
        sequence = corpus.tokens[corpus.offsets[turn] : corpus.offsets[turn + 1]].tolist()
        prefix = int(corpus.prefix[turn])
        prompt = engine.conversation(CHAT[:last])
        assert isinstance(prompt, str)
        assert engine.text_tokenizer().prompt(prompt) == sequence[:prefix]
        ids, places = torch.tensor(sequence[:-1]), torch.arange(len(sequence) - 1)
        exact = logits(model, ids, (places < prefix) | (places <= places[:, None]), places)[prefix - 1 :]
        served = engine.logits(sequence[:-1], prefix)[prefix - 1 :].double()
        assert float((served - exact).norm() / exact.norm()) < 1e-5


def test_a_chat_template_beside_the_tokenizer_is_trained_as_it_is_served(
    model: HRM, tokenizer: Path, prepared: Prepare, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    template = "{% for m in messages %}{{ m.role }}<direct>{{ m.content }}<eoq>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    records = lines(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    store = prepared(records, "--tokenizer", folder)
    engine = load(folder)
    control = {name: engine.text_tokenizer().backend.token_id(f"<{name}>") for name in ("direct", "eoq", "eoa")}
    for turn, last in enumerate((2, 4, 6)):
        wanted = []
        for message in CHAT[:last]:
            for text, name in ((message["role"], "direct"), (message["content"], "eoq")):
                wanted += [*engine.text_tokenizer().encode(text), control[name]]
        prompt = engine.conversation(CHAT[:last])
        assert not isinstance(prompt, str)
        assert prompt.ids(engine.text_tokenizer(), "direct") == wanted
        start, stop = store.corpus.offsets[turn : turn + 2]
        answer = [*engine.text_tokenizer().encode(CHAT[last]["content"]), control["eoa"]]
        assert store.corpus.tokens[start:stop].tolist() == wanted + answer
        assert store.corpus.prefix[turn] == len(wanted)


def test_turns_packed_once_would_not_be_what_is_served(model: HRM, tokenizer: Path) -> None:
    """Why each answer is a record of its own. A token has one state in a pass, and an earlier turn needs two.

    In the first answer's prompt the question sees nothing that comes later. In the second's, it stands in a prefix that
    is read both ways, and sees the answer and the next question. Nor do the tokens stay: in the first prompt eoq
    follows the question, in the second a heading does, and the answer has no eoa.
    """
    first, second = (prefix for prefix, _ in rendered(Tokenizer.load(tokenizer))[:2])
    shared = len(first) - 1  # all but eoq
    assert second[:shared] == first[:shared]
    assert second[shared] != first[shared]
    states = []
    for prefix in (first, second):
        length = len(prefix)
        both_ways = torch.ones(length, length, dtype=torch.bool)
        states.append(logits(model, torch.tensor(prefix), both_ways, torch.arange(length))[:shared])
    assert float((states[0] - states[1]).norm() / states[0].norm()) > 0.01
