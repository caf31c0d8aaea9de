"""The demo model's weights: a small Llama pre-trained once on `corpus`, in some forty minutes on two busy cores.

Place in the flow: start, rows → **pretrain** → model.safetensors. One rule: the weights that count are those that q4_0
keeps, so the last part of the training rounds them as q4_0 will, and the figures are taken after it.

    python -m deploy.demo_model.pretrain [--steps N] [--seed N] [--out DIR] [--start DIR]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from deploy.demo_model.rows import BOS, EOS, ROW_LENGTH, Row, branches, pack, packed_rows, system_ids
from deploy.demo_model.start import lay_copying
from deploy.demo_model.tokenizer import CONTEXT_LENGTH, HERE, VOCABULARY_SIZE
from gateway.chat.bundle import Bundle, make_bundle
from gateway.chat.render import IGNORED

SEED, HELD_OUT_SEED = 7, 1_000_003
ROWS, STEPS, REPORT_EVERY = 8, 900, 50
MATRIX_RATE, EMBEDDING_RATE, WARMUP_STEPS, ROUNDED_SHARE = 7e-3, 6e-4, 25, 0.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--start", type=Path, help="a folder with weights to go on from")
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
    rows = packed_rows(bundle, prefix, options.steps * ROWS, options.seed)
    matrices, embedding_and_norms = matrices_of(model), [p for p in model.parameters() if p.dim() == 1]
    embedding_and_norms.append(model.model.embed_tokens.weight)
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(embedding_and_norms, lr=EMBEDDING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]
    peaks = [(group, group["lr"]) for optimiser in optimisers for group in optimiser.param_groups]
    smooth = 0.0
    started = time.monotonic()
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("pre-training", total=options.steps)
        for step in range(1, options.steps + 1):
            done = step / options.steps
            for group, peak in peaks:
                group["lr"] = peak * min(step / WARMUP_STEPS, 0.02 + 0.49 * (1 + math.cos(math.pi * done)))
            loss = train_step(model, [next(rows) for _ in range(ROWS)], rounding=done > 1 - ROUNDED_SHARE)
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
