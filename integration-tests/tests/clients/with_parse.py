"""The official OpenAI client: an answer that a schema describes, as an object."""

import sys
from typing import Literal

import openai
from pydantic import BaseModel


class Color(BaseModel):
    color: Literal["red", "green"]


client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=120)
messages = [{"role": "user", "content": "Name a color."}]
done = client.chat.completions.parse(
    model="default", messages=messages, max_tokens=40, temperature=0, response_format=Color
)
assert done.choices[0].finish_reason == "stop", done
assert done.choices[0].message.parsed.color in ("red", "green"), done
print("openai parse ok:", done.choices[0].message.parsed)
