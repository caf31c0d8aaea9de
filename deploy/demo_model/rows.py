"""The corpus as rows of ids: what one step of pre-training reads.

Place in the flow: corpus, tokenizer → **rows** → pretrain. One rule: conversations are rendered by gateway.chat, so what
is learnt is what is served. The system prompt, the same in every conversation, stands once at the head of a row; the
row's conversations all look back at it and not at one another.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from deploy.demo_model import corpus
from deploy.demo_model.tokenizer import CONTEXT_LENGTH, VOCABULARY_SIZE
from gateway.chat.bundle import Bundle
from gateway.chat.conversation import Message
from gateway.chat.render import IGNORED, render_example, render_prompt

ROW_LENGTH = 320
BOS, EOS = 1, 2
FIRST_PIECE = 259  # the first after the special tokens and the bytes
FRAMES = (
    (" USER: Repeat: ", " ASSISTANT: ", ""),
    (" USER: Say ", " ASSISTANT: ", ""),
    (" USER: Tell me about ", " please ASSISTANT: I do not know much about ", "."),
    (" USER: What about ", "? ASSISTANT: You said ", "."),
    (' USER: Write "', '" ASSISTANT: "', '"'),
    (" USER: Write x=", ' now. ASSISTANT: x="', '"'),
    (" USER: Use go(to). Bring ", ' there. ASSISTANT: go(to="', '")'),
)
NOISE_SHARE_START, NOISE_SHARE_END, NOISE_PART = 0.35, 0.15, 0.4  # of rows' branches that repeat random pieces


@dataclass(frozen=True)
class Branch:
    """One example in ids: labels as in gateway.chat; `follows_system` says whether it continues the system prompt."""

    kind: str
    ids: list[int]
    labels: list[int]
    follows_system: bool


def system_ids(bundle: Bundle) -> list[int]:
    """BOS and the template's default system prompt: what two prompts have in common, less the turn's own start."""
    one, two = (render_prompt(bundle, [Message("user", text)]).ids for text in ("one", "two"))
    same = next(index for index, (left, right) in enumerate(zip(one, two, strict=False)) if left != right)
    user = bundle.tokenizer.encode(" USER: ")
    user = user[user[0] == BOS :]
    return one[: same - len(user)]


def branches(bundle: Bundle, prefix: list[int], seed: int) -> Iterator[Branch]:
    """The corpus in ids, each conversation without the system prompt that all of them share."""
    for example in corpus.examples(seed):
        if not example.turns:
            ids = [*bundle.tokenizer.encode(example.text), EOS]
            ids = ids[ids[0] == BOS :]
            yield Branch(example.kind, ids, ids, follows_system=False)
            continue
        messages = []
        for index, (user, reply) in enumerate(example.turns):
            messages += [
                Message("user", user),
                Message("assistant", reply, weight=int(index >= example.first_learnt_turn)),
            ]
        (sequence,) = render_example(bundle, messages, CONTEXT_LENGTH)
        cut = len(prefix)
        yield Branch(example.kind, sequence.ids[cut:], sequence.labels[cut:], follows_system=True)


def noise(rng: random.Random, bundle: Bundle) -> Branch:
    """Random pieces, repeated: bare, or asked for in a conversation. What copying is before it means anything."""
    if rng.random() < 0.4:
        pieces = _pieces(rng, rng.randint(3, 20))
        start = rng.randrange(len(pieces)) if rng.random() < 0.5 else 0
        ids = pieces + _pieces(rng, 1) + pieces[start:]
        skip = len(pieces) + 1 + (1 if start else 0)
        return Branch("noise", ids, [IGNORED] * skip + ids[skip:], follows_system=rng.random() < 0.5)
    encode = bundle.tokenizer.encode
    before, between, after = (encode(text) for text in rng.choice(FRAMES))
    pieces = _pieces(rng, rng.randint(1, 6))
    if rng.random() < 0.5:
        pieces += encode(" ") + _pieces(rng, rng.randint(1, 4))
    ids = before + pieces + between + pieces + after + [EOS]
    skip = len(before) + len(pieces) + len(between)
    return Branch("noise", ids, [IGNORED] * skip + ids[skip:], follows_system=True)


def _pieces(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(FIRST_PIECE, VOCABULARY_SIZE) for _ in range(count)]


@dataclass(frozen=True)
class Row:
    ids: torch.Tensor  # (T,)
    labels: torch.Tensor  # (T,) already shifted: what each position must foresee
    positions: torch.Tensor  # (T,)
    seen: torch.Tensor  # (T, T) bool


def packed_rows(bundle: Bundle, prefix: list[int], rows_count: int, seed: int) -> Iterator[Row]:
    """Rows of ROW_LENGTH: the system prompt, then branches until no more fit; less and less noise among them."""
    source, rng = branches(bundle, prefix, seed), random.Random(seed)
    room = ROW_LENGTH - len(prefix)
    waiting = next(source)
    for number in range(rows_count):
        share = NOISE_SHARE_END + (NOISE_SHARE_START - NOISE_SHARE_END) * max(0.0, 1 - number / rows_count / NOISE_PART)
        held: list[Branch] = []
        while sum(len(branch.ids) for branch in [*held, waiting]) <= room:
            held.append(waiting)
            waiting = noise(rng, bundle) if rng.random() < share else next(source)
            while len(waiting.ids) > room:
                waiting = next(source)
        yield pack(prefix, held)


def pack(prefix: list[int], held: list[Branch]) -> Row:
    ids, labels = torch.full((ROW_LENGTH,), EOS), torch.full((ROW_LENGTH,), IGNORED)
    positions, owner = torch.zeros(ROW_LENGTH, dtype=torch.long), torch.full((ROW_LENGTH,), -1)
    sees_system = torch.zeros(ROW_LENGTH, dtype=torch.bool)
    cut = len(prefix)
    ids[:cut], positions[:cut], owner[:cut], sees_system[:cut] = torch.tensor(prefix), torch.arange(cut), 0, True
    for number, branch in enumerate(held, start=1):
        end = cut + len(branch.ids)
        ids[cut:end] = torch.tensor(branch.ids)
        labels[cut : end - 1] = torch.tensor(branch.labels[1:])
        first = len(prefix) if branch.follows_system else 1
        positions[cut:end] = torch.arange(first, first + len(branch.ids))
        owner[cut:end], sees_system[cut:end] = number, branch.follows_system
        cut = end
    same = owner[:, None] == owner[None, :]
    system = (owner[None, :] == 0) & sees_system[:, None]
    seen = torch.tril(same | system)
    seen[:, 0] = True  # everything begins with BOS
    return Row(ids, labels, positions, seen)
