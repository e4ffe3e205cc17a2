"""langchain-openai with both of its APIs, and each way to a structured output."""

import json
import os

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Dog(BaseModel):
    """A dog."""

    name: str
    age: int


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return "21 degrees"


def run(**options):
    model = ChatOpenAI(model="kimi-mini", base_url=os.environ["URL"] + "/v1", api_key="any", **options)
    messages = [HumanMessage("What is the weather in Oslo?")]
    answer = model.bind_tools([get_weather]).invoke(messages)
    (call,) = answer.tool_calls
    messages += [answer, ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])]
    result = model.bind_tools([get_weather]).invoke(messages)
    streamed = "".join(part.text for part in model.stream("Hello"))
    dogs = [
        model.with_structured_output(Dog, method=method).invoke(f"{verb} a dog as JSON").model_dump()
        for method, verb in (("json_schema", "Invent"), ("json_mode", "Invent"), ("function_calling", "Call"))
    ]
    return {"text": str(result.text), "streamed": streamed, "dogs": dogs}


print(json.dumps({"chat": run(), "responses": run(use_responses_api=True)}))
