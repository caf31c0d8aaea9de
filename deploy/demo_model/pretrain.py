"""The demo model's weights: a small Llama pre-trained once on `corpus`, in some twenty minutes on two cores.

Place in the flow: corpus, tokenizer → **pretrain** → model.safetensors. One rule: what is learnt is what is served:
conversations are rendered by gateway.chat with the `vicuna_v1.1` template. The system prompt, the same in every
conversation, stands once at the head of a row; the row's conversations all look back at it and not at one another.

    python -m deploy.demo_model.pretrain [--minutes 22] [--out DIR]
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from deploy.demo_model import corpus
from deploy.demo_model.start import lay_copying
from deploy.demo_model.tokenizer import CONTEXT_LENGTH, HERE, VOCABULARY_SIZE
from gateway.chat.bundle import Bundle, make_bundle
from gateway.chat.conversation import Message
from gateway.chat.render import IGNORED, render_example, render_prompt

SEED, HELD_OUT_SEED = 7, 1_000_003
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
ROW_LENGTH, ROWS, STEPS, REPORT_EVERY = 320, 8, 900, 50
PEAK_LEARNING_RATE, WARMUP_STEPS, ROUNDED_SHARE = 6e-4, 25, 0.15
NOISE_SHARE_START, NOISE_SHARE_END, NOISE_PART = 0.35, 0.15, 0.4  # of rows' branches that repeat random pieces


@dataclass(frozen=True)
class Branch:
    """One example in ids: labels as in gateway.chat; `follows_system` says whether it continues the system prompt."""

    kind: str
    ids: list[int]
    labels: list[int]
    follows_system: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--start", type=Path, help="a folder with weights to go on from")
    parser.add_argument("--lr", type=float, default=PEAK_LEARNING_RATE)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--muon", type=float, default=0.006)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    bundle = make_bundle("vicuna_v1.1", (HERE / "tokenizer.json").read_bytes(), [EOS])
    if options.start:
        model = LlamaForCausalLM.from_pretrained(options.start, dtype=torch.float32)
    else:
        model = LlamaForCausalLM(configuration())
        lay_copying(model)
    train(model, bundle, options)
    save(model, options.out)
    print(f"held-out replies right after q4_0: {accuracies(quantised(model), bundle)}")


def configuration() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def train(model: LlamaForCausalLM, bundle: Bundle, options: argparse.Namespace) -> None:
    """AdamW, warm-up and cosine by the clock; the last part sees the weights as q4_0 will round them."""
    prefix = system_ids(bundle)
    rows = packed_rows(bundle, prefix, options.steps * options.rows, options.seed)
    matrices, embedding_and_norms = matrices_of(model), [p for p in model.parameters() if p.dim() == 1]
    embedding_and_norms.append(model.model.embed_tokens.weight)
    optimisers = [
        torch.optim.AdamW(
            embedding_and_norms + ([] if options.muon else matrices),
            lr=options.lr,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=True,
        )
    ]
    if options.muon:
        optimisers.append(
            torch.optim.Muon(matrices, lr=options.muon, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original")
        )
    peaks = [(group, group["lr"]) for optimiser in optimisers for group in optimiser.param_groups]
    smooth = 0.0
    started = time.monotonic()
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("pre-training", total=options.steps)
        for step in range(1, options.steps + 1):
            done = step / options.steps
            for group, peak in peaks:
                group["lr"] = peak * min(step / WARMUP_STEPS, 0.02 + 0.49 * (1 + math.cos(math.pi * done)))
            loss = train_step(model, [next(rows) for _ in range(options.rows)], rounding=done > 1 - ROUNDED_SHARE)
            for optimiser in optimisers:
                optimiser.step()
            model.zero_grad(set_to_none=True)
            smooth = loss if step == 1 else 0.97 * smooth + 0.03 * loss
            bar.update(task, completed=step, description=f"step {step} loss {smooth:.3f}")
            if step % REPORT_EVERY == 0:
                bar.console.print(
                    f"step {step} {time.monotonic() - started:.0f} s loss {smooth:.3f} {accuracies(model, bundle)}"
                )
                sys.stdout.flush()
                save(model, options.out)


def train_step(model: LlamaForCausalLM, batch: list[Row], rounding: bool) -> float:
    """Gradients of one batch; with `rounding` they are taken where q4_0 will put the weights."""
    exact = [(parameter, parameter.data) for parameter in matrices_of(model)] if rounding else []
    for parameter, values in exact:
        parameter.data = rounded(values)
    loss = loss_of(model, batch)
    loss.backward()
    for parameter, values in exact:
        parameter.data = values
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return loss.item()


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


def loss_of(model: LlamaForCausalLM, batch: list[Row]) -> torch.Tensor:
    """Mean loss of the learnt positions."""
    labels = torch.stack([row.labels for row in batch]).reshape(-1)
    kept = (labels != IGNORED).nonzero().squeeze(1)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = hidden_states(model, batch)
        logits = model.lm_head(hidden.reshape(-1, hidden.shape[-1])[kept])
    return F.cross_entropy(logits.float(), labels[kept])


def hidden_states(model: LlamaForCausalLM, batch: list[Row]) -> torch.Tensor:
    return model.model(
        input_ids=torch.stack([row.ids for row in batch]),
        position_ids=torch.stack([row.positions for row in batch]),
        attention_mask=torch.stack([row.seen for row in batch])[:, None],
        use_cache=False,
    ).last_hidden_state


@torch.no_grad()
def rounded(weights: torch.Tensor) -> torch.Tensor:
    """The values that q4_0 keeps of WEIGHTS (rows of blocks of 32), as ggml rounds them."""
    blocks = weights.reshape(-1, 32)
    extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = extreme / -8
    steps = torch.where(scale == 0, torch.zeros_like(blocks), blocks / scale)
    return ((steps + 8.5).floor().clamp(0, 15).sub(8) * scale.half().float()).reshape(weights.shape)


def matrices_of(model: LlamaForCausalLM) -> list[torch.nn.Parameter]:
    """The weights that become q4_0: every matrix but the embedding, which llama.cpp keeps at six bits."""
    return [p for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]


@torch.no_grad()
def quantised(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy whose matrices went through q4_0 and back."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    for parameter in matrices_of(copy):
        packed = quantize(parameter.detach().float().numpy(), GGMLQuantizationType.Q4_0)
        parameter.copy_(torch.from_numpy(dequantize(packed, GGMLQuantizationType.Q4_0)))
    return copy


@torch.no_grad()
def accuracies(model: LlamaForCausalLM, bundle: Bundle, count: int = 180) -> dict[str, float]:
    """For each kind of example, the share of held-out last replies that greedy decoding gives to the letter."""
    prefix = system_ids(bundle)
    source = (branch for branch in branches(bundle, prefix, HELD_OUT_SEED) if branch.follows_system)
    wanted, right = Counter[str](), Counter[str]()
    model.eval()
    for _ in range(count // 3):
        held, room = [], ROW_LENGTH - len(prefix)
        while (branch := next(source)) and len(branch.ids) <= room:
            held.append(branch)
            room -= len(branch.ids)
        row, start = pack(prefix, held), len(prefix)
        best = model.lm_head(hidden_states(model, [row])[0]).argmax(-1)
        for branch in held:
            end = start + len(branch.ids) - 1
            first = end
            while row.labels[first - 1] != IGNORED:
                first -= 1
            wanted[branch.kind] += 1
            right[branch.kind] += int((best[first:end] == row.labels[first:end]).all())
            start = end + 1
    model.train()
    return {kind: round(right[kind] / total, 2) for kind, total in sorted(wanted.items())}


def save(model: LlamaForCausalLM, out: Path) -> None:
    """config.json, generation_config.json and model.safetensors in bfloat16."""
    kept = LlamaForCausalLM(model.config).to(torch.bfloat16)
    kept.load_state_dict(model.state_dict())
    kept.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS)
    kept.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
