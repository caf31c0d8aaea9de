"""The worker's numbers beside transformers' and PEFT's, with f32 weights and f32 KV on both sides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from tests.llama_worker.running import RunningWorker, prompt, running
from tests.tiny_gguf import Shape, as_f32, write_tiny_gguf, write_tiny_lora

SHAPE = Shape(hidden=128, layers=3, heads=4, kv_heads=2, feed_forward=256, vocab_size=512, context_length=512)
RANK, ALPHA = 4, 8.0
NAMES = {  # GGUF: transformers
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
PROMPT, REPLY = prompt(150, 3), 40
CLOSE, CLEAR = 1e-3, 1e-2
WITH_FLASH_ATTENTION = (
    10  # times as far: it keeps some of its numbers in f16 (6e-3 here), which is why it is off by default
)

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module", params=["steady", "fastest"])
def served(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[RunningWorker, Path]]:
    """A worker with the f32 model, and the folder that `model.gguf` and `tuned/adapter.gguf` lie in.

    Once as it is by default, without flash attention, and once with it.
    """
    folder = tmp_path_factory.mktemp("accuracy")
    as_f32(write_tiny_gguf(folder / "f16.gguf", q4_0=False, shape=SHAPE), folder / "model.gguf")
    write_tiny_lora(folder / "tuned" / "adapter.gguf", SHAPE, 1, RANK, ALPHA, strength=0.3)
    arguments = ["--kv-type", "f32", *(["--fastest"] if request.param == "fastest" else [])]
    with running(folder / "worker", folder / "model.gguf", *arguments) as worker:
        assert worker.load("tuned", folder / "tuned").status_code == 200
        yield worker, folder


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("name", ["base", "tuned"])
def test_log_probabilities_and_greedy_tokens_are_those_of_transformers(
    served: tuple[RunningWorker, Path], name: str
) -> None:
    worker, folder = served
    model = reference(folder / "model.gguf")
    if name == "tuned":
        model = with_adapter(model, folder / "tuned" / "adapter.gguf")
    body = worker.complete(model=name, prompt=PROMPT, max_tokens=REPLY, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    (choice,) = body["choices"]
    ids = PROMPT + choice["token_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0].double()
    expected = torch.log_softmax(logits, -1).numpy()
    of_prompt = [
        entry[str(token)]["logprob"] for token, entry in zip(PROMPT[1:], choice["prompt_logprobs"][1:], strict=True)
    ]
    measured = np.array([*of_prompt, *choice["logprobs"]["token_logprobs"]])
    rows = np.arange(len(ids) - 1)
    times = WITH_FLASH_ATTENTION if worker.ready()["mode"]["fastest"] else 1
    assert np.abs(measured - expected[rows, ids[1:]]).max() <= CLOSE * times
    two_best = np.sort(expected, axis=1)[:, -2:]
    clear = (two_best[:, 1] - two_best[:, 0] > CLEAR * times) & (rows >= len(PROMPT) - 1)
    assert clear.sum() > REPLY / 2
    assert (expected.argmax(axis=1)[clear] == np.array(ids[1:])[clear]).all()


def test_the_adapter_makes_a_difference_that_the_comparison_would_see(served: tuple[RunningWorker, Path]) -> None:
    worker, _ = served
    scores = []
    for name in ("base", "tuned"):
        (choice,) = worker.complete(model=name, prompt=PROMPT, prompt_logprobs=0, max_tokens=1)["choices"]
        entries = zip(PROMPT[1:], choice["prompt_logprobs"][1:], strict=True)
        scores.append(np.array([entry[str(token)]["logprob"] for token, entry in entries]))
    assert np.abs(scores[0] - scores[1]).max() > 100 * CLOSE


def reference(path: Path) -> LlamaForCausalLM:
    """The same weights in transformers."""
    config = LlamaConfig(
        hidden_size=SHAPE.hidden,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        intermediate_size=SHAPE.feed_forward,
        vocab_size=SHAPE.vocab_size,
        max_position_embeddings=SHAPE.context_length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = np.array(tensor.data, dtype=np.float32)
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            if parts[2] in ("attn_q", "attn_k"):
                values = in_halves(values, parts[2])
            state[f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"] = torch.from_numpy(values)
        else:
            known = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
            state[f"{known[parts[0]]}.weight"] = torch.from_numpy(values)
    model.load_state_dict(state)
    return model


def with_adapter(model: LlamaForCausalLM, path: Path) -> Any:
    """The model under the adapter, as PEFT computes it."""
    targets = [name.split(".")[-1] for key, name in NAMES.items() if "norm" not in key]
    tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=targets, lora_dropout=0.0))
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        _, layer, name, _, half = tensor.name.split(".")
        values = np.array(tensor.data, dtype=np.float32)
        if half == "lora_b" and name in ("attn_q", "attn_k"):
            values = in_halves(values, name)
        key = f"base_model.model.model.layers.{layer}.{NAMES[name]}.lora_{half[-1].upper()}.weight"
        state[key] = torch.from_numpy(values)
    set_peft_model_state_dict(tuned, state)
    return tuned.eval()


def in_halves(rows: Floats, name: str) -> Floats:
    """q or k rows from GGUF's order (rotated pairs side by side) to transformers' (first halves, then second halves)."""
    heads = SHAPE.heads if name == "attn_q" else SHAPE.kv_heads
    return np.ascontiguousarray(rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape))
