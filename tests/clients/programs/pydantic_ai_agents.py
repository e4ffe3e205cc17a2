"""pydantic-ai with each of its APIs, and each way to a structured output."""

import json
import os

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider


class Dog(BaseModel):
    name: str
    age: int


url = os.environ["URL"]
openai = OpenAIProvider(base_url=f"{url}/v1", api_key="any")
models = {
    "chat": OpenAIChatModel("kimi-mini", provider=openai),
    "responses": OpenAIResponsesModel("kimi-mini", provider=openai),
    "messages": AnthropicModel("kimi-mini", provider=AnthropicProvider(base_url=url, api_key="any")),
}


def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return "21 degrees"


def run(model):
    agent = Agent(model, instructions="Be brief.", tools=[get_weather])
    with_tool = agent.run_sync("What is the weather in Oslo?")
    streamed = "".join(agent.run_stream_sync("Hello").stream_text(delta=True))
    dogs = [
        Agent(model, output_type=ToolOutput(Dog, name="Dog")).run_sync("Call a dog").output,
        Agent(model, output_type=PromptedOutput(Dog)).run_sync("Invent a dog").output,
    ]
    if not isinstance(model, AnthropicModel):  # it refuses a native output for models that it does not know
        dogs.append(Agent(model, output_type=NativeOutput(Dog)).run_sync("Invent a dog").output)
    return {"text": with_tool.output, "streamed": streamed, "dogs": [dog.model_dump() for dog in dogs]}


print(json.dumps({name: run(model) for name, model in models.items()}))
