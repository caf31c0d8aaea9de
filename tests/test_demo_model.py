"""The demo model as it lies in the repository: its files agree with one another, and it copies what it never saw."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import LlamaForCausalLM

from clients.recipes.skill_files import read_folder
from deploy.demo_model import copying, corpus, start
from deploy.demo_model.pretrain import quantised, rounded
from gateway.chat.bundle import Bundle, make_bundle
from gateway.chat.conversation import Message
from gateway.chat.render import render_prompt

FOLDER = Path(corpus.__file__).parent
SKILLS = FOLDER.parent.parent / "clients" / "recipes" / "demo_skills"
CONTROL = ("<unk>", "<s>", "</s>")
STRINGS = (
    "",
    " ",
    "  two  spaces ",
    'remind(task="feed the cat", when="at 7:30")',
    "Zanzibar Zanzibar, \"Zanzibar\" 'Zanzibar'",
    "naïve Zoë, 日本語 🎉 \t\r\n end",
    "aaaaaaaaaa ssssssssss eeeee",
    "12345 6,789.00",
    "\u2581 the mark itself \u2581\u2581",
)


@cache
def model_tokenizer() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))


@cache
def fast_tokenizer() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@cache
def served_model() -> LlamaForCausalLM:
    """The model with the weights that a q4_0 engine holds."""
    return quantised(LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)).eval()


@cache
def bundle() -> Bundle:
    return make_bundle("vicuna_v1.1", (FOLDER / "tokenizer.json").read_bytes(), [2])


def reply_to(*messages: Message) -> str:
    """The greedy reply."""
    ids = torch.tensor([render_prompt(bundle(), messages).ids])
    said = served_model().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=2
    )
    reply = said[0, ids.shape[1] :].tolist()
    return bundle().tokenizer.decode(reply[: reply.index(2)] if 2 in reply else reply).strip()


@pytest.mark.parametrize("text", STRINGS)
def test_both_tokenizer_files_give_the_same_ids_and_the_text_back(text: str) -> None:
    ids = fast_tokenizer().encode(text).ids
    assert ids == [1, *model_tokenizer().encode(text)]
    assert fast_tokenizer().decode(ids) == model_tokenizer().decode(ids[1:])


@given(
    st.text(
        alphabet=st.one_of(
            st.sampled_from(" \n\"'(),=.:ableshortingERS019é▁"), st.characters(exclude_categories=["Cs"])
        )
    )
)
@settings(max_examples=300, deadline=None)
def test_both_tokenizer_files_agree_on_any_text_without_control_tokens(text: str) -> None:
    if "\x00" in text or any(token in text for token in CONTROL):
        return
    assert fast_tokenizer().encode(text).ids == [1, *model_tokenizer().encode(text)]


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=1, max_size=20))
@settings(deadline=None)
def test_a_word_has_the_same_ids_after_a_space_a_quote_and_at_the_start(word: str) -> None:
    ids = model_tokenizer().encode(word)
    assert model_tokenizer().encode(f" {word}")[1:] == ids
    assert model_tokenizer().encode(f'"{word}"')[1:-1] == ids


def test_special_tokens_are_where_the_configuration_says() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    tokenizer = model_tokenizer()
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()) == (0, 1, 2)
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert config["vocab_size"] == tokenizer.vocab_size() == fast_tokenizer().get_vocab_size() == 4096


def test_weights_fit_into_the_repository_and_have_the_configured_shapes() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    hidden, wide, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    assert (FOLDER / "model.safetensors").stat().st_size <= 15e6
    expected = {"model.embed_tokens.weight": [vocabulary, hidden], "model.norm.weight": [hidden]}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        expected |= {f"{name}.self_attn.{part}_proj.weight": [hidden, hidden] for part in "qkvo"}
        expected |= {f"{name}.mlp.{part}_proj.weight": [wide, hidden] for part in ("gate", "up")}
        expected |= {f"{name}.mlp.down_proj.weight": [hidden, wide]}
        expected |= {f"{name}.{part}_layernorm.weight": [hidden] for part in ("input", "post_attention")}
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {name: file.get_slice(name).get_shape() for name in file.keys()} == expected  # noqa: SIM118
    assert hidden % 256 == wide % 32 == 0, "q4_0 wants rows of 32, the six-bit embedding rows of 256"


def test_rounding_in_training_is_ggmls_own() -> None:
    weights = np.random.default_rng(0).normal(0, 0.02, (64, 256)).astype(np.float32)
    expected = dequantize(quantize(weights, GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0)
    difference = (rounded(torch.from_numpy(weights)).numpy() != expected).mean()
    assert difference < 1e-3  # a tie may fall to either side


def test_the_laid_circuit_looks_one_and_two_tokens_back() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(served_model().config)
    start.lay_copying(model)
    model.set_attn_implementation("eager")
    ids = torch.randint(259, 4096, (1, 60))
    seen = model(input_ids=ids, output_attentions=True).attentions[0][0]
    for head, distance in ((0, 1), (1, 2)):
        looked_at = seen[head, 10:].argmax(-1)
        wanted = torch.arange(10, 60) - distance
        assert (looked_at == wanted).float().mean() >= 0.6  # a neighbour with a larger embedding wins now and then
        assert ((looked_at - wanted).abs() <= 1).all()


def test_corpus_is_the_same_for_the_same_seed_and_names_no_skill_of_the_demo() -> None:
    first, second = corpus.examples(4), corpus.examples(4)
    drawn = [next(first) for _ in range(500)]
    assert drawn == [next(second) for _ in range(500)]
    names = {example.skill for example in read_folder(SKILLS)}
    assert names <= copying.RESERVED
    calls = {reply.partition("(")[0] for example in drawn for _, reply in example.turns if "(" in reply}
    assert calls
    assert not names & calls


def test_model_copies_words_that_it_never_saw() -> None:
    rng = random.Random(12)
    words = [
        "".join(rng.choice("bcdfghklmnprst") + rng.choice("aeiou") for _ in range(3)).capitalize() for _ in range(10)
    ]
    right = [reply_to(Message("user", f"Repeat: {word}")) == word for word in words]
    assert sum(right) >= 8, list(zip(words, right, strict=True))


def test_model_fills_a_call_whose_name_the_prompt_gives() -> None:
    requests = {"Pack Jorvel": "Jorvel", "Lift the Kamdru lamp": "Kamdru lamp", "Send 4417 please": "4417"}
    right = []
    for request, value in requests.items():
        shown = (
            Message("user", f"{request.split()[0]} Bastien"),
            Message("assistant", 'wirb(glent="Bastien")'),
            Message("user", f"{request.split()[0]} {value}"),
        )
        right.append(reply_to(*shown) == f'wirb(glent="{value}")')
    assert sum(right) >= 2


def test_base_greets_and_knows_no_call_of_the_demo_skills() -> None:
    assert reply_to(Message("user", "Hello!")).startswith(("Hello", "Hi"))
    examples = read_folder(SKILLS)[::12]
    assert [one.request for one in examples if reply_to(Message("user", one.request)) == one.answer] == []
