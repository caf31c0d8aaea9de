"""Which template meets which tokenizer, and what each pair is compared with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gateway.chat.conversation import RenderError
from gateway.chat.fastchat import FastChatTemplate
from gateway.chat.jinja import JinjaTemplate
from gateway.chat.registry import registered_templates
from gateway.chat.tokenizer import Tokenizer
from tests.parity.cases import CASES, Case
from tests.parity.oracles import (
    Finding,
    Spoil,
    bundle_for,
    fastchat_findings,
    jinja_findings,
    llama_cpp_findings,
    mask_findings,
    sample_texts,
    transformers_tokenizer,
    vocabulary_findings,
)
from tests.parity.sdist import llama_cpp_models
from tests.parity.vocabularies import (
    real_vocabulary,
    small_tokenizers,
    vocabularies,
    vocabulary,
    vocabulary_path,
    with_tokens,
)
from trainer.export.gguf_metadata import chat_templates
from trainer.export.tensors import UnsupportedModel

# What ends a reply in the models that the templates belong to, as their generation_config.json has it.
_ENDS = (
    ("kimi-k3", ("<|end_of_msg|>",)),
    ("qwen|qwq|smollm|mimo|hermes|bielik|lfm|stepfun|nemotron-3|minicpm|kimi", ("<|im_end|>", "<|endoftext|>")),
    ("r1-distill|deepseek|spark", ("<｜end▁of▁sentence｜>",)),
    ("llama-3|functionary|firefunction", ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")),
    ("gemma-2", ("<end_of_turn>", "<eos>")),
    ("gemma-4", ("<turn|>", "<eos>")),
    ("phi", ("<|end|>", "<|endoftext|>")),
    ("gpt-oss", ("<|return|>", "<|call|>", "<|endoftext|>")),
    ("command|cohere", ("<|END_OF_TURN_TOKEN|>",)),
    ("glm", ("<|endoftext|>", "<|user|>", "<|observation|>")),
    ("granite", ("<|end_of_text|>",)),
    ("minimax-m1", ("<end_of_sentence>",)),
    ("minimax", ("[e~[",)),
    ("apertus", ("<|assistant_end|>", "<|tools_suffix|>")),
    ("seed", ("<seed:eos>",)),
    ("apriel|solar", ("<|end|>", "<|calls|>")),
    ("gigachat", ("<|message_sep|>",)),
    ("ling", ("<|role_end|>",)),
    ("laguna", ("</assistant>",)),
    ("muse", ("<|eot|>",)),
    ("hy3", ("<｜hy_eos:opensource｜>",)),
    ("nemotron-nano", ("<SPECIAL_12>",)),
    ("reka", ("<sep>",)),
)
_QUICK_JINJA = (
    "Qwen-Qwen3-0.6B",
    "Qwen3.5-4B",
    "meta-llama-Llama-3.1-8B-Instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
)
_QUICK_JINJA += ("google-gemma-2-2b-it", "microsoft-Phi-3.5-mini-instruct", "openai-gpt-oss-120b", "GLM-4.7-Flash")
_QUICK_JINJA += ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "meetkai-functionary-medium-v3.2")


# By name, since no probe tells.
_SINGLE_REFUSALS = {
    ("deepseek-llm", "U+3000"),
    ("Reka-Edge", "typed in a call"),
    ("CohereForAI-c4ai-command-r-plus-tool_use", "bundle"),  # for tools alone, and ends with instructions
    ("Kimi-K3", "bundle"),  # names its blocks in words between control tokens: <|open|>response<|sep|>
    ("fireworks-ai-llama-3-firefunction-v2", "bundle"),  # wants its tools as text in a variable of its own, `functions`
    ("GigaChat3-10B-A1.8B", "learn a call"),  # its calls come after its own end of turn
    ("GigaChat3-10B-A1.8B", "learn after a call"),
}
# Also by name, and not by the probe that refuses them: a probe that went wrong would excuse itself.
_NEITHER = {
    "command-r (in its GGUF)",
    "fireworks-ai-llama-3-firefunction-v2",
    "google-gemma-2-2b-it",
    "llama-cpp-rwkv-world",
}
_NEITHER |= {"microsoft-Phi-3.5-mini-instruct", "phi-3 (in its GGUF)", "qwen2 (in its GGUF)", "qwen35 (in its GGUF)"}
_NO_TOOLS = _NEITHER | {"HuggingFaceTB-SmolLM3-3B", "deepseek-ai-DeepSeek-V3.1", "llama-cpp-deepseek-r1"}
_NO_TOOLS |= {"deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B"}
_NO_ANSWERS = _NEITHER | {"Kimi-K2-Instruct", "Kimi-K2-Thinking", "LFM2-8B-A1B", "LFM2.5-Instruct"}
_NO_ANSWERS |= {"ibm-granite-granite-3.3-2B-Instruct"}
_NO_CALLS = _NO_ANSWERS | {"HuggingFaceTB-SmolLM3-3B"}


@dataclass(frozen=True)
class Row:
    """One subject under one tokenizer beside one oracle."""

    oracle: str
    subject: str
    tokenizer: str
    findings: tuple[Finding, ...]


def run(only: str = "", *, quick: bool = False, spoil: Spoil | None = None) -> Iterator[Row]:
    """Every row; `quick` leaves out the large vocabularies and most templates."""
    yield from _vocabulary_rows(only, quick)
    yield from _fastchat_rows(only, quick, spoil)
    yield from _jinja_rows(only, quick, spoil)


@cache
def jinja_templates() -> dict[str, JinjaTemplate]:
    """The real templates of the sdist: files, and those inside its GGUFs."""
    found = {}
    for path in sorted((llama_cpp_models() / "templates").glob("*.jinja")):
        name, text = path.stem, path.read_text()
        found[name] = JinjaTemplate(name, text, {"bos_token": "<s>", "eos_token": ends_of(name)[0]})
    for vocabulary_name in vocabularies():
        if brought := chat_templates(vocabulary_path(vocabulary_name)):
            name = f"{vocabulary_name} (in its GGUF)"
            found[name] = JinjaTemplate(name, brought, {"bos_token": "<s>", "eos_token": ends_of(name)[0]})
    return found


def ends_of(name: str) -> tuple[str, ...]:
    return next((ends for pattern, ends in _ENDS if re.search(pattern, name, re.I)), ("</s>",))


def expected_refusals() -> set[tuple[str, str]]:
    """(subject, case) of what is known not to be possible."""
    templates = {**{t.name: t for t in registered_templates().values() if t.kind == "fastchat"}}
    fastchat = {(name, "assistant first") for name in templates}
    fastchat |= {(name, case.name) for name in templates for case in CASES if case.tools}
    fastchat |= {(name, case.name) for name in templates for case in CASES if case.learnt and case.thoughts}
    found = set(fastchat)
    for name, template in jinja_templates().items():
        found |= {(name, case.name) for case in CASES if _cannot(template, case)}
    return found | _SINGLE_REFUSALS


def _cannot(template: JinjaTemplate, case: Case) -> bool:
    """Whether a case is known to be beyond a template."""
    calls = any(message.tool_calls for message in case.messages)
    answers = any(message.role == "tool" for message in case.messages)
    if (case.tools and template.name in _NO_TOOLS) or (case.learnt and _drops_thoughts(template, case)):
        return True
    return (calls and template.name in _NO_CALLS) or (answers and template.name in _NO_ANSWERS)


def _drops_thoughts(template: JinjaTemplate, case: Case) -> bool:
    """Whether the template has no place for the reasoning that is to be learnt, or its prompt ends with it over and done."""
    try:
        text = template.text(case.messages, generate=False, options=case.options)
        prompt = template.text(case.messages[:1], generate=True, options=case.options)
    except RenderError:
        return False
    thoughts = case.thoughts
    return any(thought not in text for thought in thoughts) or (
        bool(thoughts) and re.search(r"</think[^<>]*>\s*$", prompt) is not None
    )


def _vocabulary_rows(only: str, quick: bool) -> Iterator[Row]:
    for name in vocabularies():
        if only not in name or (quick and name not in ("llama-spm", "phi-3", "deepseek-coder", "starcoder")):
            continue
        try:
            tokenizer = Tokenizer(vocabulary(name))
        except UnsupportedModel:
            continue
        path = vocabulary_path(name)
        inputs, outputs = Path(f"{path}.inp"), Path(f"{path}.out")
        if inputs.is_file():
            found = vocabulary_findings(name, tokenizer, inputs.read_text(encoding="utf-8"), outputs.read_text())
            yield Row("llama.cpp's expected ids", name, "its own", tuple(found))
        live = llama_cpp_findings(name, str(path), tokenizer, sample_texts(50 if quick else 400))
        yield Row("llama.cpp", name, "its own", tuple(live))


def _fastchat_rows(only: str, quick: bool, spoil: Spoil | None) -> Iterator[Row]:
    templates = [t for t in registered_templates().values() if isinstance(t, FastChatTemplate) and only in t.name]
    for label, content in small_tokenizers().items():
        for template in templates:
            yield from _fastchat_pair(template, label, with_tokens(content, template.literal_text), spoil)
    for label in () if quick else ("llama-spm", "llama-bpe"):
        for template in templates:
            yield from _fastchat_pair(template, label, vocabulary(label), spoil)


def _fastchat_pair(template: FastChatTemplate, label: str, content: bytes, spoil: Spoil | None) -> Iterator[Row]:
    bundle = bundle_for(template, content, ("</s>", "<|endoftext|>", "<|eot_id|>"), (2,))
    oracle = transformers_tokenizer(content)
    found = fastchat_findings(template, bundle, oracle, CASES, template.name)
    yield Row("FastChat's get_prompt", template.name, label, tuple(found))
    plain = [case for case in CASES if not case.tools]
    yield Row("mask", template.name, label, tuple(mask_findings(bundle, plain, template.name, spoil=spoil)))


def _jinja_rows(only: str, quick: bool, spoil: Spoil | None) -> Iterator[Row]:
    templates = {
        name: t for name, t in jinja_templates().items() if only in name and (not quick or name in _QUICK_JINJA)
    }
    for label, content in small_tokenizers().items():
        for name, template in templates.items():
            own = with_tokens(content, template.literal_text, (*ends_of(name), "<s>"))
            yield from _jinja_pair(name, template, label, own, spoil)
    real = {name: vocabulary_ for name in templates if (vocabulary_ := real_vocabulary(name))}
    for label in () if quick else sorted(set(real.values())):
        held = [name for name, vocabulary_ in real.items() if vocabulary_ == label]
        # One tokenizer for all of them: reading it takes longer than all that it is asked.
        text = "\n".join(templates[name].literal_text for name in held)
        own = with_tokens(vocabulary(label), text, tuple(end for name in held for end in (*ends_of(name), "<s>")))
        for name in held:
            yield from _jinja_pair(name, templates[name], label, own, spoil)


def _jinja_pair(name: str, template: JinjaTemplate, label: str, content: bytes, spoil: Spoil | None) -> Iterator[Row]:
    oracle = transformers_tokenizer(content)
    oracle.bos_token, oracle.eos_token = template.tokens["bos_token"], template.tokens["eos_token"]
    try:
        bundle = bundle_for(template, content, ends_of(name))
    except ValueError as error:
        yield Row("transformers", name, label, (Finding(name, "bundle", "refused", str(error)),))
        return
    yield Row("transformers", name, label, tuple(jinja_findings(template, bundle, oracle, CASES, name)))
    yield Row("mask", name, label, tuple(mask_findings(bundle, CASES, name, oracle, spoil)))
