"""instructor with each of its modes for OpenAI's and Anthropic's APIs."""

import json
import os
import sys
from collections.abc import Iterable

import anthropic
import instructor
import openai
from pydantic import BaseModel


class Dog(BaseModel):
    name: str
    age: int


url = os.environ["URL"]


def run(kind, mode):
    chosen = instructor.Mode[mode]
    if kind == "openai":
        client = instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0), mode=chosen)
    else:
        client = instructor.from_anthropic(anthropic.Anthropic(base_url=url, api_key="any", max_retries=0), mode=chosen)
    verb = "Call" if "TOOLS" in mode or mode == "FUNCTIONS" else "Invent"
    options = {
        "model": "kimi-mini",
        "messages": [{"role": "user", "content": f"{verb} a dog"}],
        "max_retries": 0,
        **({"max_tokens": 4096} if kind == "anthropic" else {}),
    }
    create = client.chat.completions
    if "PARALLEL" in mode:
        return [dog.model_dump() for dog in create.create(response_model=Iterable[Dog], **options)]
    parts = list(create.create_partial(response_model=Dog, **options))
    return [create.create(response_model=Dog, **options).model_dump(), parts[-1].model_dump()]


result = {}
for kind, mode in [pair.split(":") for pair in sys.argv[1:]]:
    try:
        result[f"{kind}:{mode}"] = run(kind, mode)
    except Exception as error:  # one mode does not hide the others
        result[f"{kind}:{mode}"] = f"{type(error).__name__}: {error}"
print(json.dumps(result))
