"""The life of a run: queued → in_progress → completed, or failed, or canceled; what is done of it outlives the process.

Place in the flow: routes → **evals** → grading, inference, store. Its one rule: a line whose item is stored is never asked
again, and a run that was canceled gets no further item.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from gateway.access import Caller
from gateway.errors import RateLimited, RequestError, StoreUnavailable, TunegateError
from gateway.evals.data import Row, read_rows
from gateway.generation import Generation
from gateway.grading.graders import Graders, add_usage, sample_of
from gateway.grading.placeholders import FillError, fill_all, look_up
from gateway.inference import Inference
from gateway.patience import ask_patiently
from gateway.replies import Reply, usage_of
from gateway.store import evals as statements
from gateway.store.blobs import Blobs
from gateway.store.database import Store
from gateway.store.evals import Eval, EvalItem, EvalRun
from gateway.store.ids import new_id
from gateway.wire import evals as wire
from gateway.wire.chat import ChatRequest, Usage
from gateway.wire.graders import Grader, input_text
from gateway.wire.response_items import to_messages

logger = logging.getLogger("tunegate.evals")

RUNS_AT_ONCE = 2
WAITING = 1000
LINES_AT_ONCE = 4  # of one run
PAUSE_S = 1.0  # before a store that could not serve is asked again


@dataclass
class _Sampled:
    """A line's reply: `shown` is what the output item tells of it, `sample` what placeholders speak of."""

    sample: dict[str, Any]
    shown: dict[str, Any]
    usage: dict[str, Usage] = field(default_factory=dict)


class EvalRunner:
    """Drives the runs; all that lasts is in the store."""

    def __init__(
        self, store: Store, blobs: Blobs, inference: Inference, graders: Graders, started: asyncio.Event
    ) -> None:
        """`started`: the models that there are can be asked; no line fails because its model is not there yet."""
        self._store, self._blobs, self._inference, self._graders = store, blobs, inference, graders
        self._started = started
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(RUNS_AT_ONCE)

    async def start(self) -> None:
        """Goes on with the runs that were under way when the process ended."""
        for run in await self._store.read(statements.select_open_runs):
            self.begin(run, Caller(run.project_id))

    async def stop(self) -> None:
        """Leaves what runs for the next start."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def require_place(self) -> None:
        """Raises RateLimited where too many runs wait already."""
        if len(self._tasks) >= WAITING:
            raise RateLimited(f"{WAITING} eval runs are not over; try again later", retry_after_s=30)

    def begin(self, run: EvalRun, caller: Caller) -> None:
        """Drives a run that is stored."""
        task = asyncio.create_task(self._drive(run, caller), name=f"eval run {run.id}")
        self._tasks[run.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(run.id, None))

    def drop(self, run_id: str) -> None:
        """Stops driving a run, whose row says already that it is over or gone."""
        if (task := self._tasks.get(run_id)) is not None:
            task.cancel()

    async def _drive(self, run: EvalRun, caller: Caller) -> None:
        """One run to its end, through whatever the store does in between."""
        await self._started.wait()
        async with self._slots:
            broken: dict[str, str] | None = None
            while True:
                try:
                    if broken is None:
                        await self._run(run, caller)
                    else:
                        await self._finish(run, "failed", broken)
                    return
                except StoreUnavailable as error:
                    logger.warning("eval run %s waits: %s", run.id, error.message)
                    await asyncio.sleep(PAUSE_S)
                except Exception:
                    if broken is not None:
                        raise
                    logger.exception("the eval run %s broke off", run.id)
                    broken = {"code": "server_error", "message": "the server failed; its log says more"}

    async def _run(self, run: EvalRun, caller: Caller) -> None:
        made = await self._store.read(lambda c: statements.select_eval(c, run.eval_id, run.project_id))
        if made is None:
            return
        try:
            rows = await read_rows(self._store, self._blobs, run)
        except RequestError as error:
            await self._finish(run, "failed", {"code": "invalid_data", "message": error.message})
            return
        if not await self._store.write(lambda c: statements.begin_run(c, run.id, len(rows))):
            return
        done = await self._store.read(lambda c: statements.select_numbers(c, run.id))
        left = iter([(number, row) for number, row in enumerate(rows) if number not in done])

        async def work() -> None:
            for number, row in left:
                item = await self._judge(run, made, number, row, caller)
                if not await self._store.write(partial(statements.insert_item, item=item)):
                    return

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(LINES_AT_ONCE):
                    group.create_task(work())
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        await self._finish(run, "completed")

    async def _finish(self, run: EvalRun, status: statements.RunStatus, error: dict[str, str] | None = None) -> None:
        made = await self._store.read(lambda c: statements.select_eval(c, run.eval_id, run.project_id))
        names = [] if made is None else [criterion["name"] for criterion in made.testing_criteria]
        outcomes = await self._store.read(lambda c: statements.select_outcomes(c, run.id))
        summary = wire.summarise(names, outcomes)
        await self._store.write(lambda c: statements.finish_run(c, run.id, status, summary, error))

    async def _judge(self, run: EvalRun, made: Eval, number: int, row: Row, caller: Caller) -> EvalItem:
        """What becomes of a line; what fails is told in its item and ends nothing else."""
        results: list[dict[str, Any]] = []
        try:
            sampled = await self._sample(run, row, caller)
        except (TunegateError, FillError) as error:
            message = error.message if isinstance(error, TunegateError) else str(error)
            failure = {"code": "sampling_failed", "message": message}
            sampled = _Sampled({}, wire.sample_object(model=run.model, error=failure))
        else:
            for criterion in made.testing_criteria:
                results.append(await self._grade(criterion, row, sampled, caller))
        failed = not results or any("error" in result["sample"] for result in results)
        status = "error" if failed else "pass" if all(result["passed"] for result in results) else "fail"
        usage = {model: wire.usage_counts(used) for model, used in sampled.usage.items()}
        return EvalItem(
            id=new_id("outputitem_"),
            project_id=run.project_id,
            created_at=int(time.time()),
            run_id=run.id,
            number=number,
            status=status,  # type: ignore[arg-type]
            item=row["item"],
            sample=sampled.shown,
            results=results,
            usage=usage,
        )

    async def _grade(self, criterion: Grader, row: Row, sampled: _Sampled, caller: Caller) -> dict[str, Any]:
        told: dict[str, Any] = {}
        score = 0.0
        try:
            graded = await self._graders.grade(criterion, row["item"], sampled.sample, caller)
        except TunegateError as error:
            told["error"] = error.message
        else:
            score = graded.score
            for model, used in graded.usage.items():
                sampled.usage[model] = add_usage(sampled.usage.get(model), used)
            details = [str(text) for name, text in graded.errors.items() if name.endswith("_details")]
            told |= {"error": details[0]} if details else {}
        passed = "error" not in told and wire.passes(criterion, score)
        name, kind = criterion["name"], criterion["type"]
        return {"name": name, "type": kind, "passed": passed, "score": score, "sample": told}

    async def _sample(self, run: EvalRun, row: Row, caller: Caller) -> _Sampled:
        """The reply that is judged: the data's own, or the model's."""
        brought = row["sample"] or {}
        if not run.model:
            text = brought.get("output_text")
            shown = wire.sample_object(
                model=str(brought.get("model") or ""), output=text if isinstance(text, str) else None
            )
            return _Sampled(sample_of(text) | brought if isinstance(text, str) else brought, shown)
        source = run.data_source
        messages = _messages(source.get("input_messages"), row)
        asked = wire.parse_asked(source, messages)
        generation = await ask_patiently(lambda: self._ask(asked, caller))
        reply = Reply()
        async for deltas in generation.deltas():
            for delta in deltas:
                reply.add(delta)
        text, usage = "".join(reply.text), usage_of(generation)
        calls = [
            {"type": "function", "function": {"name": call.name, "arguments": "".join(call.arguments)}}
            for call in reply.calls
        ]
        shown = wire.sample_object(
            model=run.model,
            messages=[{"role": message["role"], "content": input_text(message["content"])} for message in messages],
            output=text,
            finish_reason=reply.finish_reason,
            usage=usage,
            params=source.get("sampling_params"),
        )
        sample = sample_of(text) | {"output_tools": calls, "model": run.model, "finish_reason": reply.finish_reason}
        return _Sampled(sample, shown, {run.model: usage})

    async def _ask(self, asked: Any, caller: Caller) -> Generation:
        messages = asked.messages if isinstance(asked, ChatRequest) else to_messages(asked.items)
        return await self._inference.chat(
            asked.model,
            messages,
            asked.sampling,
            caller=caller,
            stream=False,
            tool_use=asked.tools.use,
            options=asked.options or None,
            arguments=asked.tools.arguments,
        )


def _messages(template: Mapping[str, Any] | None, row: Row) -> list[dict[str, Any]]:
    """What the model is asked for a line. Raises FillError, RequestError."""
    variables = {"item": row["item"], "sample": row["sample"] or {}}
    if template is not None and template["type"] == "template":
        asked = template["template"]
        texts = fill_all((input_text(message["content"]) for message in asked), variables)
        return [{"role": message["role"], "content": text} for message, text in zip(asked, texts, strict=True)]
    found = row["item"].get("input") if template is None else look_up(template["item_reference"], variables)
    if isinstance(found, str):
        return [{"role": "user", "content": found}]
    if not isinstance(found, list) or not all(isinstance(message, dict) and "role" in message for message in found):
        raise RequestError("the line's input is neither a text nor a list of messages")
    return [{"role": message["role"], "content": _text(message.get("content"))} for message in found]


def _text(content: Any) -> str:
    try:
        return input_text(content)
    except (KeyError, TypeError) as error:
        raise RequestError("the line's input holds a message whose content is no text") from error
