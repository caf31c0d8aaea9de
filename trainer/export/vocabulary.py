"""A model's vocabulary as GGUF wants it: pieces, scores and kinds by id.

Place in the flow: written into the base's GGUF. One rule: the engine is sent ids, so what matters is that every id has its
piece and that the control tokens are known as such; llama.cpp never tokenises for us.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import gguf

from trainer.export.hf_folder import HfFolder
from trainer.export.tensors import UnsupportedModel

_GPT2, _SENTENCEPIECE = "gpt2", "llama"


@dataclass
class Vocabulary:
    """Lists are by id and of the length of the model's embedding."""

    model: str  # llama.cpp's name for the kind: "llama" for SentencePiece, "gpt2" for byte-level BPE
    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    merges: list[str] = field(default_factory=list)
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    add_space_prefix: bool = True

    def write(self, writer: gguf.GGUFWriter, add_bos: bool) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre("default" if self.model == _SENTENCEPIECE else "gpt-2")
        writer.add_token_list([piece.encode() for piece in self.pieces])
        writer.add_token_scores(self.scores)
        writer.add_token_types(self.kinds)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.bos_id is not None:
            writer.add_bos_token_id(self.bos_id)
        if self.eos_id is not None:
            writer.add_eos_token_id(self.eos_id)
        if self.unk_id is not None:
            writer.add_unk_token_id(self.unk_id)
        writer.add_add_bos_token(add_bos and self.bos_id is not None)
        writer.add_add_space_prefix(self.add_space_prefix)


def read_vocabulary(folder: HfFolder, size: int) -> Vocabulary:
    """The vocabulary of a folder's tokenizer.model, or else of its tokenizer.json; `size` is the embedding's."""
    tokenizer = json.loads(folder.tokenizer_json)
    if (folder.path / "tokenizer.model").is_file() and not _is_byte_level(tokenizer):  # tiktoken's has that name too
        vocabulary = _from_sentencepiece(folder.read_bytes("tokenizer.model"), size)
    else:
        vocabulary = _from_tokenizer_json(tokenizer, size)
        vocabulary.bos_id = folder.config.get("bos_token_id")
    eos = folder.eos_token_ids
    vocabulary.eos_id = eos[0] if eos else vocabulary.eos_id
    for token in tokenizer.get("added_tokens", []):
        _place(vocabulary, token["id"], token["content"], gguf.TokenType.CONTROL if token["special"] else None)
    return vocabulary


def _from_sentencepiece(content: bytes, size: int) -> Vocabulary:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    if model.vocab_size() > size:
        raise UnsupportedModel(f"tokenizer.model has {model.vocab_size()} pieces, the model embeds only {size}")
    pieces, scores, kinds = _blank(size)
    for index in range(model.vocab_size()):
        pieces[index], scores[index] = model.id_to_piece(index), model.get_score(index)
        kinds[index] = _kind(model, index)
    return Vocabulary(
        _SENTENCEPIECE,
        pieces,
        scores,
        kinds,
        bos_id=model.bos_id() if model.bos_id() >= 0 else None,
        eos_id=model.eos_id() if model.eos_id() >= 0 else None,
        unk_id=model.unk_id(),
        add_space_prefix=model.encode("a", out_type=str)[0].startswith("▁"),
    )


def _kind(model: Any, index: int) -> int:
    if model.is_unknown(index):
        return int(gguf.TokenType.UNKNOWN)
    if model.is_control(index):
        return int(gguf.TokenType.CONTROL)
    if model.is_byte(index):
        return int(gguf.TokenType.BYTE)
    return int(gguf.TokenType.UNUSED if model.is_unused(index) else gguf.TokenType.NORMAL)


def _from_tokenizer_json(tokenizer: dict[str, Any], size: int) -> Vocabulary:
    model = tokenizer["model"]
    if model.get("type") != "BPE" or not _is_byte_level(tokenizer):
        raise UnsupportedModel(
            "the folder has no tokenizer.model and its tokenizer.json is not a byte-level BPE; "
            "SentencePiece (tokenizer.model) and byte-level BPE tokenizers can be prepared"
        )
    pieces, scores, kinds = _blank(size)
    for piece, index in model["vocab"].items():
        if index >= size:
            raise UnsupportedModel(f"tokenizer.json has the id {index}, the model embeds only {size}")
        pieces[index], kinds[index] = piece, int(gguf.TokenType.NORMAL)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(_GPT2, pieces, scores, kinds, merges, add_space_prefix=False)


def _is_byte_level(tokenizer: dict[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps(tokenizer.get("pre_tokenizer"))


def _place(vocabulary: Vocabulary, index: int, piece: str, kind: int | None) -> None:
    if index >= len(vocabulary.pieces):
        raise UnsupportedModel(f"the token '{piece}' has the id {index}, the model embeds {len(vocabulary.pieces)}")
    if vocabulary.kinds[index] == gguf.TokenType.UNKNOWN:
        return
    vocabulary.pieces[index] = piece
    vocabulary.kinds[index] = int(gguf.TokenType.USER_DEFINED if kind is None else kind)


def _blank(size: int) -> tuple[list[str], list[float], list[int]]:
    return [f"[PAD{i}]" for i in range(size)], [-10_000.0] * size, [int(gguf.TokenType.UNUSED)] * size
