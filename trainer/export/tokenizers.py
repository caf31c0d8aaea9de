"""Any tokenizer as a `tokenizer.json`: SentencePiece models, tiktoken files, the vocabulary inside a GGUF.

Place in the flow: prepare → **tokenizers**. One rule: what is written gives the ids that the model's own tokenizer gives, or it
is refused with the reason. No torch; what is heavy is done here, where a model is prepared, so that the gateway never has to.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer.export.gguf_metadata import read_metadata
from trainer.export.pretokenizers import CL100K, O200K, by_patterns, pretokenizer
from trainer.export.tensors import UnsupportedModel

# Kinds of pieces: SentencePiece's numbers, and GGUF's.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_SPACE = "▁"
Prefix = Literal["never", "first", "always"]  # where SentencePiece's dummy space is put
_TIKTOKEN_PATTERNS = {
    "llama": ("llama-bpe", None),
    "llama4": ("gpt-4o", None),
    "qwen": ("qwen2", None),
    "qwen2": ("qwen2", None),
    "chatglm": ("chatglm-bpe", None),
    "gpt_oss": (None, O200K),
    "gpt-4": (None, CL100K),
}


@dataclass
class Pieces:
    """A vocabulary by id."""

    texts: list[str]
    scores: list[float] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)

    def of_kind(self, *kinds: int) -> list[int]:
        return [number for number, kind in enumerate(self.kinds) if kind in kinds]


def tokenizer_json_of(source: Path) -> bytes:
    """The tokenizer of a model's folder, or of a GGUF file, as a tokenizer.json. Raises UnsupportedModel with the reason."""
    if source.is_file() and source.suffix == ".gguf":
        return from_gguf(source)
    if (source / "tokenizer.json").is_file():
        return (source / "tokenizer.json").read_bytes()
    config = _optional_json(source / "tokenizer_config.json")
    model_file = source / "tokenizer.model"
    if model_file.is_file() and not _is_tiktoken(model_file):
        return from_sentencepiece(model_file, config)
    for path in (model_file, *sorted(source.glob("*.tiktoken")), *sorted(source.glob("tiktoken*.model"))):
        if path.is_file():
            return from_tiktoken(path, config, str(_optional_json(source / "config.json").get("model_type", "")))
    ggufs = sorted(source.glob("*.gguf"))
    if ggufs:
        return from_gguf(ggufs[0])
    raise UnsupportedModel(
        f"{source} brings no tokenizer that can be read here: tokenizer.json, tokenizer.model, *.tiktoken or a .gguf"
    )


def from_sentencepiece(path: Path, config: dict[str, Any] | None = None) -> bytes:
    """A SentencePiece model (BPE or Unigram) with what tokenizer_config.json adds to it."""
    from sentencepiece import sentencepiece_model_pb2 as schema

    model = schema.ModelProto.FromString(path.read_bytes())
    kind = model.trainer_spec.model_type
    if kind not in (schema.TrainerSpec.BPE, schema.TrainerSpec.UNIGRAM):
        raise UnsupportedModel(
            f"{path.name} is a SentencePiece model of words or characters; BPE and Unigram are taken"
        )
    if model.normalizer_spec.precompiled_charsmap and model.normalizer_spec.name not in ("identity", ""):
        charsmap: bytes | None = bytes(model.normalizer_spec.precompiled_charsmap)
    else:
        charsmap = None
    config = config or {}
    pieces = Pieces(
        [piece.piece for piece in model.pieces], [piece.score for piece in model.pieces], [p.type for p in model.pieces]
    )
    added = _config_tokens(config)
    prefix: Prefix = "never"
    if config.get("add_prefix_space", model.normalizer_spec.add_dummy_prefix):
        prefix = "always" if config.get("legacy") else "first"  # as transformers' Llama tokenizer takes it
    bos = model.trainer_spec.bos_id if config.get("add_bos_token", True) else None
    return _sentencepiece_json(
        pieces,
        prefix=prefix,
        squeeze=model.normalizer_spec.remove_extra_whitespaces,
        unigram=kind == schema.TrainerSpec.UNIGRAM,
        charsmap=charsmap,
        bos=bos if bos is not None and bos >= 0 else None,
        added=added,
    )


def from_gguf(path: Path) -> bytes:
    """The vocabulary inside a GGUF file."""
    found = read_metadata(path)

    def read(key: str, default: Any = None) -> Any:
        return found.get(f"tokenizer.ggml.{key}", default)

    kind = str(read("model", ""))
    pieces = Pieces(list(read("tokens", [])), list(read("scores", [])), [int(k) for k in read("token_type", [])])
    if not pieces.texts:
        raise UnsupportedModel(f"{path.name} holds no vocabulary")
    if not pieces.kinds:
        pieces.kinds = [NORMAL] * len(pieces.texts)
    name = str(read("pre", "") or "")
    bos = read("bos_token_id", 1 if kind == "llama" else None)
    wants_bos = read("add_bos_token")
    if wants_bos is None:  # as llama.cpp takes it
        wants_bos = kind == "llama" or name in ("llama-bpe", "llama3", "llama-v3", "tekken", "chameleon")
    bos = int(bos) if wants_bos and bos is not None else None
    if kind == "llama":
        spaced: Prefix = "always" if read("add_space_prefix", True) else "never"
        return _sentencepiece_json(pieces, prefix=spaced, squeeze=False, unigram=False, bos=bos)
    merges = _merges(read("merges", []))
    if kind == "gemma4":
        return _spaced_bpe_json(pieces, merges, bos)
    if kind != "gpt2":
        what = {"bert": "WordPiece, of embedding models", "t5": "Unigram, of T5 and embedding models"}.get(
            kind, f"'{kind}'"
        )
        raise UnsupportedModel(f"{path.name} has a vocabulary of a kind that no chat model has here: {what}")
    cut = pretokenizer(name)
    if cut is None:
        raise UnsupportedModel(
            f"{path.name} cuts its words as '{name}', which is not known here; use the model's own folder"
        )
    return _byte_level_json(pieces, merges, cut[0], whole_words=cut[1], bos=bos)


def from_tiktoken(path: Path, config: dict[str, Any], model_type: str) -> bytes:
    """A file of base64 tokens and ranks, with the control tokens that tokenizer_config.json names."""
    ranks: dict[bytes, int] = {}
    for line in path.read_bytes().splitlines():
        if line:
            encoded, number = line.split()
            ranks[base64.b64decode(encoded)] = int(number)
    known = _TIKTOKEN_PATTERNS.get(model_type)
    if known is None:
        raise UnsupportedModel(
            f"{path.name} is tiktoken's, and how its model ('{model_type or 'unknown'}') cuts words is in code that it brings; "
            f"known are {', '.join(sorted(_TIKTOKEN_PATTERNS))}. A tokenizer.json beside it is taken"
        )
    name, pattern = known
    cut = pretokenizer(name) if name else (by_patterns((pattern or "",)), False)
    assert cut is not None
    texts = [f"<|unused {number}|>" for number in range(max(ranks.values()) + 1)]
    for spelled, rank in ranks.items():
        texts[rank] = _as_byte_level(spelled)
    known_texts = frozenset(map(_as_byte_level, ranks))
    pieces = Pieces(texts, [], [NORMAL if text in known_texts else UNUSED for text in texts])
    for token_id, text, special in _config_tokens(config):
        while len(pieces.texts) <= token_id:
            pieces.texts.append(f"<|unused {len(pieces.texts)}|>")
            pieces.kinds.append(UNUSED)
        pieces.texts[token_id], pieces.kinds[token_id] = text, CONTROL if special else USER_DEFINED
    bos = _id_of(config.get("bos_token"), pieces) if config.get("add_bos_token", False) else None
    return _byte_level_json(pieces, list(_rank_merges(ranks)), cut[0], whole_words=True, bos=bos)


def _byte_level_json(
    pieces: Pieces, merges: Iterable[Sequence[str]], cut: dict[str, Any], *, whole_words: bool, bos: int | None
) -> bytes:
    vocab = {text: number for number, text in enumerate(pieces.texts) if pieces.kinds[number] in (NORMAL, UNUSED)}
    model = {
        "type": "BPE",
        "vocab": vocab,
        "merges": _possible(merges, vocab),
        "ignore_merges": whole_words,
        "byte_fallback": False,
        "fuse_unk": False,
    }
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return _write(model, pieces, bos, normalizer=None, pre_tokenizer=cut, decoder=decoder)


def _sentencepiece_json(
    pieces: Pieces,
    *,
    prefix: Prefix,
    squeeze: bool,
    unigram: bool,
    charsmap: bytes | None = None,
    bos: int | None,
    added: Sequence[tuple[int, str, bool]] = (),
) -> bytes:
    for token_id, text, special in added:
        while len(pieces.texts) <= token_id:
            pieces.texts.append(f"<unused {len(pieces.texts)}>")
            pieces.scores.append(0.0)
            pieces.kinds.append(UNUSED)
        pieces.texts[token_id], pieces.kinds[token_id] = text, CONTROL if special else USER_DEFINED
    unknown = next(iter(pieces.of_kind(UNKNOWN)), None)
    has_bytes = bool(pieces.of_kind(BYTE))
    if unigram:
        model: dict[str, Any] = {
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": [
                [text, score if kind in (NORMAL, BYTE) or number == unknown else -1e6]
                for number, (text, score, kind) in enumerate(
                    zip(pieces.texts, pieces.scores, pieces.kinds, strict=True)
                )
            ],
            "byte_fallback": has_bytes,
        }
    else:
        vocab = {text: number for number, text in enumerate(pieces.texts)}
        normal = {text for number, text in enumerate(pieces.texts) if pieces.kinds[number] == NORMAL}
        model = {
            "type": "BPE",
            "vocab": vocab,
            "merges": _score_merges(pieces, normal),
            "unk_token": None if unknown is None else pieces.texts[unknown],
            "fuse_unk": True,
            "byte_fallback": has_bytes,
            "ignore_merges": False,
        }
    steps: list[dict[str, Any]] = []
    if charsmap is not None:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    if squeeze:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    spaces: dict[str, Any] | None = None
    if prefix == "first":
        spaces = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "first", "split": False}
    elif prefix == "always":  # after each control token too, as in llama.cpp
        steps.append({"type": "Prepend", "prepend": _SPACE})
    if prefix != "first":
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    undone: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix != "never":
        undone.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _write(
        model,
        pieces,
        bos,
        normalizer={"type": "Sequence", "normalizers": steps} if steps else None,
        pre_tokenizer=spaces,
        decoder={"type": "Sequence", "decoders": undone},
    )


def _spaced_bpe_json(pieces: Pieces, merges: list[list[str]], bos: int | None) -> bytes:
    """Gemma's: BPE over whole lines in which spaces are written out."""
    unknown = next(iter(pieces.of_kind(UNKNOWN)), None)
    vocab = {text: number for number, text in enumerate(pieces.texts)}
    model = {
        "type": "BPE",
        "vocab": vocab,
        "merges": _possible(merges, vocab),
        "unk_token": None if unknown is None else pieces.texts[unknown],
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
    }
    return _write(
        model,
        pieces,
        bos,
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "[^\\n]+|\\n+"}, "behavior": "Isolated", "invert": False},
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
    )


def _write(model: dict[str, Any], pieces: Pieces, bos: int | None, **parts: Any) -> bytes:
    added = [
        {
            "id": number,
            "content": pieces.texts[number],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": pieces.kinds[number] != USER_DEFINED,
        }
        for number in pieces.of_kind(CONTROL, USER_DEFINED, UNKNOWN)
        if pieces.texts[number]
    ]
    processor = None
    if bos is not None:
        name = pieces.texts[bos]
        single = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        tokens = {name: {"id": name, "ids": [bos], "tokens": [name]}}
        pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
        processor = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": processor,
        **parts,
        "model": model,
    }
    return json.dumps(whole, ensure_ascii=False).encode()


def _score_merges(pieces: Pieces, normal: set[str]) -> list[list[str]]:
    """SentencePiece's BPE joins the pair whose whole has the best score; the first of equals is the one with the lower id."""
    merges = []
    for number, text in enumerate(pieces.texts):
        if text not in normal or len(text) < 2:
            continue
        for cut in range(1, len(text)):
            if text[:cut] in normal and text[cut:] in normal:
                merges.append((-pieces.scores[number], number, cut, [text[:cut], text[cut:]]))
    return [merge for _, _, _, merge in sorted(merges, key=lambda found: found[:3])]


def _merges(lines: Iterable[str]) -> list[list[str]]:
    cuts = ((line, line.find(" ", 1)) for line in lines)
    return [[line[:cut], line[cut + 1 :]] for line, cut in cuts if cut > 0]


def _possible(merges: Iterable[Sequence[str]], vocab: dict[str, int]) -> list[list[str]]:
    """Merges whose parts and whole are there; some files list more."""
    return [[left, right] for left, right in merges if left in vocab and right in vocab and left + right in vocab]


def _rank_merges(ranks: dict[bytes, int]) -> Iterable[list[str]]:
    """The pair that each token is made of in the end: what its bytes come to with the ranks below its own."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _join(ranks, token, rank)
            if len(parts) == 2:
                yield [_as_byte_level(part) for part in parts]


def _join(ranks: dict[bytes, int], token: bytes, below: int) -> list[bytes]:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 1:
        found = [(ranks.get(parts[n] + parts[n + 1], below), n) for n in range(len(parts) - 1)]
        rank, at = min(found)
        if rank >= below:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _byte_letters() -> list[str]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]


_BYTE_LETTERS = _byte_letters()


def _as_byte_level(token: bytes) -> str:
    return "".join(map(_BYTE_LETTERS.__getitem__, token))


def _config_tokens(config: dict[str, Any]) -> list[tuple[int, str, bool]]:
    """What tokenizer_config.json adds: (id, text, whether it is a control token)."""
    found = config.get("added_tokens_decoder") or {}
    return [(int(number), str(token["content"]), bool(token.get("special"))) for number, token in found.items()]


def _id_of(token: Any, pieces: Pieces) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return pieces.texts.index(text) if text in pieces.texts else None


def _is_tiktoken(path: Path) -> bool:
    """A line of it is base64 and a number; a SentencePiece model begins with a protobuf tag."""
    with path.open("rb") as file:
        first = file.readline(4096).split()
    return len(first) == 2 and first[1].isdigit()


def _optional_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}
