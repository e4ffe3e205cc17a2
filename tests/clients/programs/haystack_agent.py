"""Haystack: an agent with a tool, a stream, and a structured output."""

import json
import os
from typing import Annotated

from haystack.components.agents import Agent
from haystack.components.generators.chat import OpenAIChatGenerator, OpenAIResponsesChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import tool
from haystack.utils import Secret
from pydantic import BaseModel


class Dog(BaseModel):
    name: str
    age: int


@tool
def get_weather(city: Annotated[str, "the city"]) -> str:
    """Get the weather in a city."""
    return "21 degrees"


def run(kind, **format):
    def generator(**options):
        return kind(
            api_key=Secret.from_token("any"), model="kimi-mini", api_base_url=os.environ["URL"] + "/v1", **options
        )

    agent = Agent(chat_generator=generator(), tools=[get_weather])
    messages = agent.run(messages=[ChatMessage.from_user("What is the weather in Oslo?")])["messages"]
    parts = []
    generator(streaming_callback=lambda part: parts.append(part.content)).run([ChatMessage.from_user("Hello")])
    dog = generator(generation_kwargs=format).run([ChatMessage.from_user("Invent a dog")])["replies"][0].text
    return {"text": messages[-1].text, "streamed": "".join(parts), "dogs": [json.loads(dog)]}


print(
    json.dumps(
        {
            "chat": run(OpenAIChatGenerator, response_format=Dog),
            "responses": run(OpenAIResponsesChatGenerator, text_format=Dog),
        }
    )
)
