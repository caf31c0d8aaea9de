"""A random Llama model as a Hugging Face folder, small enough to train in seconds, and job directories on it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from gateway.chat.bundle import Bundle
from gateway.jobdir import BaseRef, FileRef, Hyperparameters, JobDir, JobSpec, Lora, Options

SENTENCES = [
    "Set a timer for ten minutes.",
    "What is the weather in Boston tomorrow?",
    "Write a note that says buy milk and bread.",
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:",
    "weather(place='Paris', day='today')",
    "timer(minutes=5)",
    "note(text='call the dentist')",
    "0123456789 café naïve",
]


def write_tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    tied: bool = True,
) -> Path:
    """Writes config.json, model.safetensors, tokenizer.model, tokenizer.json; the weights are random and say nothing."""
    folder.mkdir(parents=True)
    vocabulary_size = write_tokenizer(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 2,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": vocabulary_size,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(config, np.random.default_rng(seed)), folder / "model.safetensors", {"format": "pt"})
    return folder


def _weights(config: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    hidden, inner, head = (
        config["hidden_size"],
        config["intermediate_size"],
        config["hidden_size"] // config["num_attention_heads"],
    )
    kv = head * config["num_key_value_heads"]

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0, 1.2 / columns**0.5, (rows, columns)).astype(np.float32)

    def norm() -> np.ndarray:
        return rng.uniform(0.7, 1.3, hidden).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden), "model.norm.weight": norm()}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": norm(),
            f"{prefix}.post_attention_layernorm.weight": norm(),
            f"{prefix}.self_attn.q_proj.weight": matrix(hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": matrix(kv, hidden),
            f"{prefix}.self_attn.v_proj.weight": matrix(kv, hidden),
            f"{prefix}.self_attn.o_proj.weight": matrix(hidden, hidden),
            f"{prefix}.mlp.gate_proj.weight": matrix(inner, hidden),
            f"{prefix}.mlp.up_proj.weight": matrix(inner, hidden),
            f"{prefix}.mlp.down_proj.weight": matrix(hidden, inner),
        }
    return tensors


def write_tokenizer(folder: Path, added: Sequence[str] = ()) -> int:
    """A small SentencePiece tokenizer, in both forms, with `added` control tokens; returns how many tokens it has."""
    sentences = folder / "sentences.txt"
    sentences.write_text("\n".join(SENTENCES * 10))
    sentencepiece.SentencePieceTrainer.train(
        input=str(sentences),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=448,
        byte_fallback=True,
        bos_id=1,
        eos_id=2,
        unk_id=0,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    sentences.unlink()
    (folder / "tokenizer.vocab").unlink()
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = _as_tokenizer_json(model)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return int(tokenizer.get_vocab_size())


def _as_tokenizer_json(model: Any) -> Tokenizer:
    """The same ids in the fast form: merges in the order of SentencePiece's scores."""
    pieces = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    merges = [
        (-model.get_score(i), (piece[:cut], piece[cut:]))
        for piece, i in pieces.items()
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    merges.sort(key=lambda merge: merge[0])
    tokenizer = Tokenizer(
        BPE(pieces, [pair for _, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def write_examples(path: Path, count: int, *, first: int = 0) -> Path:
    """JSONL in OpenAI's form: requests for timers with a number in them that the reply repeats."""
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"Set a timer for {number} minutes."},
                {"role": "assistant", "content": f"timer(minutes={number})"},
            ]
        }
        for number in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_job(
    folder: Path,
    base: Path,
    training: Path,
    *,
    validation: Path | None = None,
    seed: int = 7,
    max_length: int = 256,
    hyperparameters: Hyperparameters | None = None,
    lora: Lora | None = None,
    options: Options | None = None,
    threads: int = 1,
) -> JobDir:
    """A job directory as the gateway makes it, on a prepared base."""
    job = JobDir(folder)
    job.data.mkdir(parents=True)
    job.template.mkdir()
    for name in ("template.json", "tokenizer.json"):
        shutil.copy(base / name, job.template / name)
    bundle = Bundle.from_files({path.name: path.read_bytes() for path in job.template.iterdir()})
    described = json.loads((base / "base.json").read_text())
    spec = JobSpec(
        job_id="ftjob-test",
        model=described["name"],
        created_at=1_700_000_000,
        base=BaseRef(described["name"], str(base), described.get("gguf"), described["digest"], described.get("hf")),
        training_file=_pinned(job, training),
        validation_file=_pinned(job, validation) if validation else None,
        seed=seed,
        threads=threads,
        max_length=max_length,
        template_digest=bundle.digest,
        hyperparameters=hyperparameters or Hyperparameters(),
        lora=lora or Lora(rank=4, alpha=8),
        options=options or Options(),
    )
    job.write_spec(spec)
    return job


def _pinned(job: JobDir, path: Path) -> FileRef:
    shutil.copy(path, job.data / path.name)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return FileRef("file-test", path.name, f"sha256:{digest}", f"data/{path.name}")
