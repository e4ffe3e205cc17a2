"""litellm with each provider whose API the server has."""

import json
import os

import litellm
from pydantic import BaseModel


class Dog(BaseModel):
    name: str
    age: int


URL = os.environ["URL"]
PROVIDERS = {"openai": f"{URL}/v1", "hosted_vllm": f"{URL}/v1", "moonshot": f"{URL}/v1", "anthropic": URL}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def run(provider):
    def ask(messages, **options):
        return litellm.completion(
            f"{provider}/kimi-mini", messages, api_base=PROVIDERS[provider], api_key="any", **options
        )

    messages = [{"role": "user", "content": "What is the weather in Oslo?"}]
    answer = ask(messages, tools=[WEATHER]).choices[0].message
    messages += [answer, {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "21 degrees"}]
    text = ask(messages, tools=[WEATHER]).choices[0].message.content
    parts = ask([{"role": "user", "content": "Hello"}], stream=True, stream_options={"include_usage": True})
    streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    dogs = []
    if provider in ("openai", "hosted_vllm"):
        answer = ask([{"role": "user", "content": "Invent a dog"}], response_format=Dog)
        dogs.append(json.loads(answer.choices[0].message.content))
    return {"text": text, "streamed": streamed, "dogs": dogs}


print(json.dumps({provider: run(provider) for provider in PROVIDERS}))
