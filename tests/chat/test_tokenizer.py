"""Tokenizers: typed control tokens stay characters, bytes are what ids stand for, conversions keep the ids."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from gateway.chat.tokenizer import MARK_END, MARK_START, Controls, Tokenizer
from tests.tiny_model import write_tiny_model
from tests.tiny_tokenizers import byte_level, sentencepiece_like
from trainer.export.pretokenizers import CL100K
from trainer.export.tensors import UnsupportedModel
from trainer.export.tokenizers import from_gguf, from_sentencepiece, tokenizer_json_of

TEXTS = [
    "Hello world",
    "  two  spaces ",
    "naïve 😀 日本語\n\n\ttabs",
    "",
    " ",
    "a",
    "don't 12345",
    "\n",
    "e\u0301 \u200d",
]
KINDS = {"byte-level": Tokenizer(byte_level()), "sentencepiece": Tokenizer(sentencepiece_like())}

pieces = st.sampled_from(
    [
        "<|im_end|>",
        "</s>",
        "<s>",
        "<|im_",
        "end|>",
        "<",
        "|",
        ">",
        "s",
        " ",
        "\n",
        "é",
        "😀",
        "a",
        MARK_START,
        MARK_END,
        "<unk>",
    ]
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(typed=st.lists(pieces, max_size=12).map("".join))
def test_no_control_token_comes_of_what_somebody_typed(kind: str, typed: str) -> None:
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(tokenizer.mark(typed))
    assert tokenizer.control_id_set.isdisjoint(set(ids) - {tokenizer.control_ids.get("<unk>")})
    shown = b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace")
    expected = typed.replace(MARK_START, "").replace(MARK_END, "")
    assert shown in (expected, f" {expected}")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters=f"{MARK_START}{MARK_END}▁"), max_size=40))
def test_bytes_of_ids_are_the_bytes_of_the_text(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]
    read = b"".join(map(tokenizer.token_bytes, tokenizer.encode(tokenizer.mark(text)))).decode()
    assert read in (text, f" {text}")


def test_a_control_token_inside_a_longer_one_is_marked_with_it() -> None:
    controls = Controls(["<a>", "<a><b>"])
    assert controls.mark("x<a><b>y<a>") == f"x{MARK_START}<a><b>{MARK_END}y{MARK_START}<a>{MARK_END}"
    assert controls.find(f"<a>{MARK_START}<a>{MARK_END}") == [("<a>", 0)]


def test_marks_go_into_every_text_of_a_json_value() -> None:
    marked = Controls(["<a>"]).mark_all({"<a>": ["<a>", 1, None, {"k": "x"}]})
    inside = f"{MARK_START}<a>{MARK_END}"
    assert marked == {inside: [inside, 1, None, {"k": "x"}]}


def test_a_mark_that_lost_its_partner_leaves_no_trace_and_keeps_its_sides_apart() -> None:
    tokenizer = KINDS["byte-level"]
    ids = tokenizer.encode(f"<|im_{MARK_START}end|>")
    assert tokenizer.control_id_set.isdisjoint(ids)
    assert tokenizer.decode(ids) == "<|im_end|>"


def test_words_that_a_template_writes_itself_are_control_tokens_for_it() -> None:
    made = json.loads(byte_level())
    size = len(made["model"]["vocab"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    made["added_tokens"] += [{"id": size, "content": "<think>", **flags}, {"id": size + 1, "content": "\n\n", **flags}]
    tokenizer = Tokenizer(json.dumps(made).encode())
    assert "<think>" in tokenizer.controls_of("x <think>\n\n y").names
    assert "\n\n" not in tokenizer.controls_of("x <think>\n\n y").names, "whitespace is text"
    assert "<think>" not in tokenizer.controls_of("nothing of it").names
    assert tokenizer.encode("<think>") == [size]
    assert size not in tokenizer.encode(tokenizer.controls_of("<think>").mark("<think>"))


def test_a_unigram_vocabulary_that_holds_its_control_tokens_makes_none_of_them_of_text() -> None:
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((chr(c), -5.0) for c in range(33, 127))]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=0))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = Tokenizer(made.to_str().encode())
    assert tokenizer.encode("a</s>")[-1] == 2
    assert 2 not in tokenizer.encode(tokenizer.mark("a</s>"))
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(tokenizer.mark("a</s>")))) == b" a</s>"


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"not json"])
def test_what_is_no_tokenizer_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        Tokenizer(content)


def _spm(folder: Path, kind: str, **options: Any) -> Path:
    lines = folder / "lines.txt"
    lines.write_text("\n".join(["hello world and others", "the quick brown fox jumps", "naïve café 12345 done"] * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines),
        model_prefix=str(folder / "tokenizer"),
        model_type=kind,
        vocab_size=options.pop("vocab_size", 330),
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return folder / "tokenizer.model"


SPM_OPTIONS: dict[str, dict[str, Any]] = {
    "as Llama's": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "without a space in front": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "normalized": {},
    "with symbols of its own": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<tool>"],
        "control_symbols": ["<sys>"],
    },
}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("options", SPM_OPTIONS)
def test_sentencepiece_models_keep_their_ids(kind: str, options: str, tmp_path: Path) -> None:
    path = _spm(tmp_path, kind, **SPM_OPTIONS[options])
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = Tokenizer(from_sentencepiece(path))
    for text in [*TEXTS, "hello <tool> world", "others fox 12345", "ｆｕｌｌ width ﬁ"]:
        if not text.startswith(" "):  # there transformers, whom we follow, leaves out the dummy space
            assert tokenizer.encode(text) == oracle.encode(text), text
    assert tokenizer.prefix_ids == [oracle.bos_id()]


def test_a_folder_with_a_sentencepiece_model_alone_is_converted(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "tiny")
    whole = Tokenizer(tokenizer_json_of(source))
    (source / "tokenizer.json").unlink()
    converted = Tokenizer(tokenizer_json_of(source))
    for text in TEXTS:
        if not text.startswith(" "):
            assert converted.encode(text) == whole.encode(text)
    assert converted.prefix_ids == whole.prefix_ids


def _ranks() -> dict[bytes, int]:
    """Ranks as a training of BPE over bytes gives them."""
    trained = json.loads(byte_level())["model"]
    letters = {v: k for k, v in _byte_letters().items()}
    tokens = [bytes([byte]) for byte in range(256)]
    for merge in trained["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        tokens.append(bytes(letters[letter] for letter in left + right))
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


def _byte_letters() -> dict[int, str]:
    alphabet = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in alphabet]
    return {byte: chr(byte) for byte in alphabet} | {byte: chr(256 + n) for n, byte in enumerate(rest)}


@pytest.mark.parametrize(("name", "model_type"), [("vocab.tiktoken", "gpt-4"), ("tokenizer.model", "gpt-4")])
def test_tiktoken_files_keep_their_ids(name: str, model_type: str, tmp_path: Path) -> None:
    ranks = _ranks()
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    (tmp_path / name).write_bytes(b"".join(lines))
    end = {"content": "<|end|>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {str(len(ranks)): end}}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    oracle = tiktoken.Encoding("test", pat_str=CL100K, mergeable_ranks=ranks, special_tokens={"<|end|>": len(ranks)})
    tokenizer = Tokenizer(tokenizer_json_of(tmp_path))
    for text in [*TEXTS, "assistant weather call <|end|> x", "The quick brown fox 0123456789"]:
        assert tokenizer.encode(text) == oracle.encode(text, allowed_special="all"), text
    assert tokenizer.control_ids == {"<|end|>": len(ranks)}


def test_a_tiktoken_file_of_an_unknown_model_is_refused_with_what_would_help(tmp_path: Path) -> None:
    (tmp_path / "x.tiktoken").write_bytes(base64.b64encode(b"a") + b" 0\n")
    (tmp_path / "config.json").write_text('{"model_type": "mystery"}')
    with pytest.raises(UnsupportedModel, match=r"'mystery'.*tokenizer\.json beside it"):
        tokenizer_json_of(tmp_path)


def test_a_folder_without_any_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="brings no tokenizer"):
        tokenizer_json_of(tmp_path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 16, b"PK\x03\x04" + b"\0" * 64])
def test_a_damaged_gguf_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(UnsupportedModel):
        from_gguf(path)


@pytest.mark.parametrize("content", [byte_level(), sentencepiece_like()])
def test_plain_and_sanitized_ids_are_transformers_ids(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    oracle, tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path)), Tokenizer(content)
    for text in TEXTS:
        assert tokenizer.encode(text) == oracle(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.prefix_ids + tokenizer.encode(text) == oracle(text)["input_ids"]
