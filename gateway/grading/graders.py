"""Runs a grader over one sample: `Graders.grade`. What a grader is was checked by `wire.graders`.

Its one rule: a grader that cannot do its work says why in `errors`, and its score is 0; only the client's fault raises.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.access import Caller
from gateway.chat.conversation import ROLES, Message
from gateway.errors import EngineError, RateLimited
from gateway.grading.formula import FormulaError, evaluate, parse_formula
from gateway.grading.placeholders import FillError, UnknownVariable, fill, fill_all
from gateway.grading.similarity import TooLong, cosine, similarity
from gateway.inference import Inference
from gateway.patience import ask_patiently
from gateway.replies import Reply, usage_of
from gateway.wire.chat import Usage
from gateway.wire.graders import EMBEDDING_MODEL, Grader, grader_items, input_text
from gateway.wire.sampling import Sampling
from gateway.wire.structured import Structured

VERDICT_TOKENS = 256


@dataclass
class Graded:
    """A score with all that was found on the way; `errors` are OpenAI's names of what went wrong."""

    score: float = 0.0
    sub_scores: dict[str, float] = field(default_factory=dict)
    errors: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Usage] = field(default_factory=dict)  # by model
    sampled_model: str | None = None

    def fail(self, error: str, details: str) -> None:
        self.score = 0.0
        self.errors |= {error: True, f"{error}_details": details}


class Graders:
    """Holds nothing but the way to the models."""

    def __init__(self, inference: Inference, *, patience_s: float = 0) -> None:
        """`patience_s`: how long a model that is busy or on its way is waited for."""
        self._inference, self._patience_s = inference, patience_s

    async def grade(self, grader: Grader, item: Mapping[str, Any], sample: Mapping[str, Any], caller: Caller) -> Graded:
        """Raises RequestError where a model is unknown or refuses what it is asked, as chat does."""
        graded = Graded()
        variables = {"item": item, "sample": sample}
        try:
            match grader["type"]:
                case "string_check":
                    graded.score = _check(grader, variables)
                case "text_similarity":
                    await self._compare(grader, variables, graded, caller)
                case "score_model":
                    await self._score(grader, variables, graded, caller)
                case "label_model":
                    await self._label(grader, variables, graded, caller)
                case "multi":
                    await self._combine(grader, item, sample, graded, caller)
        except UnknownVariable as error:
            graded.fail("invalid_variable_error", str(error))
        except (FillError, TooLong) as error:
            graded.fail("other_error", str(error))
        except (EngineError, RateLimited) as error:
            graded.fail("model_grader_server_error", error.message)
        return graded

    async def _compare(self, grader: Grader, variables: Mapping[str, Any], graded: Graded, caller: Caller) -> None:
        text, reference = fill(grader["input"], variables), fill(grader["reference"], variables)
        metric = grader["evaluation_metric"]
        if metric != "cosine":
            graded.score = await asyncio.to_thread(similarity, metric, text, reference)
            return
        made = await ask_patiently(
            lambda: self._inference.embed(EMBEDDING_MODEL, [text or " ", reference or " "], caller=caller),
            self._patience_s,
        )
        graded.usage[EMBEDDING_MODEL] = Usage(made.prompt_tokens, 0)
        graded.score = cosine(*map(_floats, made.vectors))

    async def _score(self, grader: Grader, variables: Mapping[str, Any], graded: Graded, caller: Caller) -> None:
        low, high = grader.get("range") or (0.0, 1.0)
        form = {"result": {"type": "number"}}
        said = await self._verdict(grader, variables, form, graded, caller)
        result = said.get("result")
        if isinstance(result, bool) or not isinstance(result, int | float):
            graded.fail("model_grader_parse_error", f"the model gave no number: {said!r}"[:300])
        else:
            graded.score = min(max(float(result), low), high)

    async def _label(self, grader: Grader, variables: Mapping[str, Any], graded: Graded, caller: Caller) -> None:
        form = {"label": {"type": "string", "enum": grader["labels"]}}
        said = await self._verdict(grader, variables, form, graded, caller)
        if said.get("label") not in grader["labels"]:
            graded.fail("model_grader_parse_error", f"the model gave none of the labels: {said!r}"[:300])
        else:
            graded.score = float(said["label"] in grader["passing_labels"])

    async def _verdict(
        self,
        grader: Grader,
        variables: Mapping[str, Any],
        form: dict[str, Any],
        graded: Graded,
        caller: Caller,
    ) -> dict[str, Any]:
        """What a model says, held to an object of `form`; empty where it is cut off in the middle."""
        schema = {"type": "object", "properties": form, "required": [*form], "additionalProperties": False}
        asked = grader.get("sampling_params") or {}
        most = asked.get("max_completions_tokens") or asked.get("max_completion_tokens") or VERDICT_TOKENS
        sampling = Sampling(
            max_tokens=most,
            temperature=1.0 if asked.get("temperature") is None else asked["temperature"],
            top_p=asked.get("top_p") or 1.0,
            seed=asked.get("seed"),
            structured=Structured("json", schema, "grader"),
        )
        reply = await self.ask(grader["model"], messages_of(grader["input"], variables), sampling, graded, caller)
        try:
            said = json.loads("".join(reply.text))
        except ValueError:
            said = None
        return said if isinstance(said, dict) else {}

    async def ask(
        self, model: str, messages: Sequence[Message], sampling: Sampling, graded: Graded, caller: Caller
    ) -> Reply:
        """A model's reply; what it used is added to `graded`."""
        generation = await ask_patiently(
            lambda: self._inference.chat(model, messages, sampling, caller=caller, stream=False), self._patience_s
        )
        reply = Reply()
        async for deltas in generation.deltas():
            for delta in deltas:
                reply.add(delta)
        graded.sampled_model = model
        graded.usage[model] = add_usage(graded.usage.get(model), usage_of(generation))
        return reply

    async def _combine(
        self, grader: Grader, item: Mapping[str, Any], sample: Mapping[str, Any], graded: Graded, caller: Caller
    ) -> None:
        for name, part in grader_items(grader):
            one = await self.grade(part, item, sample, caller)
            graded.sub_scores[name] = one.score
            graded.errors |= one.errors
            graded.sampled_model = one.sampled_model or graded.sampled_model
            for model, used in one.usage.items():
                graded.usage[model] = add_usage(graded.usage.get(model), used)
        try:
            graded.score = evaluate(parse_formula(grader["calculate_output"]), graded.sub_scores)
        except FormulaError as error:
            graded.fail("formula_parse_error", str(error))


def messages_of(template: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> list[Message]:
    """A template's messages with their placeholders filled in. Raises FillError."""
    texts = fill_all((input_text(message["content"]) for message in template), variables)
    return [Message(ROLES[message["role"]], text) for message, text in zip(template, texts, strict=True)]


def sample_of(text: str) -> dict[str, Any]:
    """A reply as placeholders speak of it: `output_text`, and `output_json` where it is JSON."""
    sample: dict[str, Any] = {"output_text": text}
    with contextlib.suppress(ValueError, RecursionError):
        sample["output_json"] = json.loads(text)
    return sample


def add_usage(first: Usage | None, second: Usage) -> Usage:
    if first is None:
        return second
    return Usage(
        first.prompt_tokens + second.prompt_tokens,
        first.completion_tokens + second.completion_tokens,
        first.cached_tokens + second.cached_tokens,
        first.reasoning_tokens + second.reasoning_tokens,
    )


def _check(grader: Grader, variables: Mapping[str, Any]) -> float:
    text, reference = fill(grader["input"], variables), fill(grader["reference"], variables)
    match grader["operation"]:
        case "eq":
            return float(text == reference)
        case "ne":
            return float(text != reference)
        case "like":
            return float(reference in text)
    return float(reference.lower() in text.lower())


def _floats(vector: str) -> tuple[float, ...]:
    data = base64.b64decode(vector)
    return struct.unpack(f"<{len(data) // 4}f", data)
