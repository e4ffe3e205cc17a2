"""smolagents: an agent that calls tools, and one that writes code."""

import json
import os

from smolagents import CodeAgent, OpenAIServerModel, ToolCallingAgent, tool


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city.

    Args:
        city: the city.
    """
    return "21 degrees"


model = OpenAIServerModel("kimi-mini", api_base=os.environ["URL"] + "/v1", api_key="any")
agent = ToolCallingAgent(tools=[get_weather], model=model, max_steps=3)
text = agent.run("What is the weather in Oslo?")
streamed = "".join(part.content or "" for part in model.generate_stream([{"role": "user", "content": "Hello"}]))
code = CodeAgent(tools=[get_weather], model=model, max_steps=3, stream_outputs=True).run("Write code")
print(json.dumps({"chat": {"text": text, "streamed": streamed, "code": code}}))
