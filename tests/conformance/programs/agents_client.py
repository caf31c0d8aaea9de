"""openai-agents: an agent run, streamed, typed, and with a session, over the responses API that it uses by default."""

import asyncio
import os
from typing import Literal

from agents import Agent, ModelSettings, Runner, SQLiteSession, set_tracing_disabled
from pydantic import BaseModel


class Answer(BaseModel):
    place: Literal["Paris", "Rome"]


set_tracing_disabled(True)  # traces would go to OpenAI
model, brief = os.environ["MODEL"], ModelSettings(max_tokens=40, temperature=0)


async def main() -> None:
    agent = Agent(name="parrot", model=model, model_settings=brief)
    whole = await Runner.run(agent, "Repeat after me: hello.")
    assert whole.final_output, whole
    streamed = Runner.run_streamed(agent, "Repeat after me: hello.")
    deltas = [
        event.data.delta
        async for event in streamed.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    assert "".join(deltas) == streamed.final_output == whole.final_output, deltas
    typed = await Runner.run(Agent(name="guide", model=model, output_type=Answer), "Name a place.")
    assert typed.final_output.place in ("Paris", "Rome"), typed
    session = SQLiteSession("one")
    await Runner.run(agent, "My name is Ada.", session=session)
    again = await Runner.run(agent, "What is my name?", session=session)
    assert again.final_output and len(await session.get_items()) == 4
    chained = await Runner.run(agent, "Say it again.", previous_response_id=whole.last_response_id)
    assert chained.final_output


asyncio.run(main())
