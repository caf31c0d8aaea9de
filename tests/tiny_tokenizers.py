"""Two small tokenizers made on the spot: one as SentencePiece's models are, one byte-level as Llama 3's and Qwen's."""

from __future__ import annotations

import json
from functools import lru_cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

_TEXT = [
    "A chat between a curious user and an assistant. USER: hello there ASSISTANT: I am fine, thanks. ",
    'The quick brown fox jumps over the lazy dog; 0123456789 (call name="Boston") weather today?\n',
    "### Instruction: write a response that completes the request ### Response: well, of course\n\n",
] * 20


@lru_cache
def sentencepiece_like() -> bytes:
    """tokenizer.json with <unk> <s> </s>, byte fallback, a dummy space in front, BOS added."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *bytes_], max_token_length=8, show_progress=False
    )
    tokenizer.train_from_iterator([word for line in _TEXT for word in line.split()], trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    made = json.loads(tokenizer.to_str())
    made["added_tokens"] = [token for token in made["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(made).encode()


@lru_cache
def byte_level() -> bytes:
    """tokenizer.json with the control tokens of chatml and llama-3."""
    tokenizer = Tokenizer(models.BPE())
    # Newlines stand apart from the word after them, as in Llama 3's and Qwen's own patterns.
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    byte_level_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), byte_level_])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>"]
    special += ["<|end_header_id|>", "<|eot_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return bytes(tokenizer.to_str(), "utf-8")
