"""openai-agents with both of its APIs."""

import asyncio
import json
import os

from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel


class Dog(BaseModel):
    name: str
    age: int


@function_tool
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return "21 degrees"


set_tracing_disabled(True)
client = AsyncOpenAI(base_url=os.environ["URL"] + "/v1", api_key="any")


async def run(model):
    agent = Agent(name="agent", instructions="Be brief.", model=model, tools=[get_weather])
    result = await Runner.run(agent, "What is the weather in Oslo?")
    streamed = Runner.run_streamed(agent, "Hello")
    text = ""
    async for event in streamed.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            text += event.data.delta
    dog = await Runner.run(Agent(name="dogs", model=model, output_type=Dog), "Invent a dog")
    return {"text": result.final_output, "streamed": text, "dogs": [dog.final_output.model_dump()]}


async def main():
    models = {
        "chat": OpenAIChatCompletionsModel("kimi-mini", client),
        "responses": OpenAIResponsesModel("kimi-mini", client),
    }
    print(json.dumps({name: await run(model) for name, model in models.items()}))


asyncio.run(main())
