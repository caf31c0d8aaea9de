"""The weights that pre-training starts from: random, but for a circuit that copies, laid by hand.

Place in the flow: **start** → pretrain. One rule: nothing here knows any word. Models of this size find copying by
themselves, after some millions of tokens that two cores would rather not read; so it is given to them:

- layer 0, heads 0 and 1, look one and two tokens back (through the phases of the rotary embedding) and write what
  stood there into parts of the residual stream that the token embedding leaves free;
- layers 1 and 2, heads 0 and 1, look for the place where the last two tokens stood before, and copy what came next.

Pre-training then learns what to copy, and when.
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

WORD, BACK_ONE, BACK_TWO = slice(0, 128), slice(128, 192), slice(192, 256)  # parts of the residual stream
ROPE_BASE = 10_000.0
SURENESS = 3.0  # the last norm's weight: how far apart the logits start
EMBEDDING_STD, CONSTANT = 0.035, 0.1
LOOK_BACK, MATCH, WRITE_BACK, COPY = 40.0, 3.0, 0.32, 0.65  # strengths
FAST_PAIRS, SLOW_PAIRS = 12, 12  # the first pairs tell neighbours apart, those after turn too slowly to matter


@torch.no_grad()
def lay_copying(model: LlamaForCausalLM) -> None:
    """Writes the circuit into a freshly made model of hidden size 256 with four heads."""
    generator = torch.Generator().manual_seed(11)
    hidden, head = 256, model.config.head_dim
    half = head // 2
    constant = torch.randn(128, generator=generator).sign() / 128**0.5
    embedding = torch.randn(model.config.vocab_size, 128, generator=generator) * EMBEDDING_STD
    embedding -= (embedding @ constant)[:, None] * constant
    table = model.model.embed_tokens.weight
    table.zero_()
    table[:, WORD] = embedding + CONSTANT * constant

    sketch = orthogonal(64, 128, generator)  # a word as the 64 numbers that are passed on
    sketch -= (sketch @ constant)[:, None] * constant
    angles = ROPE_BASE ** (-torch.arange(half) / half)
    scale = (
        hidden**0.5 / (EMBEDDING_STD**2 * 128 + CONSTANT**2) ** 0.5 * CONSTANT
    )  # the constant's size once normalised
    strength = (LOOK_BACK * 8) ** 0.5 / scale / FAST_PAIRS**0.5
    first = model.model.layers[0].self_attn
    for number, (distance, target) in enumerate(((1, BACK_ONE), (2, BACK_TWO))):
        rows = slice(number * head, (number + 1) * head)
        query, key = torch.zeros(head, hidden), torch.zeros(head, hidden)
        for pair in range(FAST_PAIRS):
            turn = -angles[pair] * distance
            query[pair, WORD], query[pair + half, WORD] = turn.cos() * constant, turn.sin() * constant
            key[pair, WORD] = constant
        first.q_proj.weight[rows] = strength * query
        first.k_proj.weight[rows] = strength * key
        first.v_proj.weight[rows] = 0.0
        first.v_proj.weight[rows, WORD] = WRITE_BACK * sketch
        first.o_proj.weight[:, rows] = 0.0
        first.o_proj.weight[target, rows] = WRITE_BACK * torch.eye(64)

    # A pair's two numbers turn into each other with distance, so one pair serves one of the two matches.
    model.model.norm.weight.fill_(SURENESS)
    slow = [row for first_pair in (0, 1) for row in range(head) if row % half >= SLOW_PAIRS and row % 2 == first_pair]
    for layer in model.model.layers[1:2]:
        attention = layer.self_attn
        for number in range(4):
            rows = slice(number * head, (number + 1) * head)
            for weight in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight):
                weight[rows] = 0.0
            attention.o_proj.weight[:, rows] = 0.0
            one, two = orthogonal(len(slow) // 2, 64, generator), orthogonal(len(slow) // 2, 64, generator)
            query, key = torch.zeros(len(slow), hidden), torch.zeros(len(slow), hidden)
            query[: len(one), WORD], query[len(one) :, BACK_ONE] = one @ sketch, two
            key[: len(one), BACK_ONE], key[len(one) :, BACK_TWO] = one, two
            for index, row in enumerate(slow):
                attention.q_proj.weight[number * head + row] = MATCH * query[index]
                attention.k_proj.weight[number * head + row] = MATCH * key[index]
            part = slice(number % 2 * 64, (number % 2 + 1) * 64)
            attention.v_proj.weight[rows, part] = COPY * torch.eye(64)
            attention.o_proj.weight[part, rows] = COPY * torch.eye(64)


def orthogonal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """ROWS orthonormal rows."""
    return torch.linalg.qr(torch.randn(columns, rows, generator=generator)).Q.T.contiguous()
