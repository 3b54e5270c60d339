"""Instructor: a typed answer by JSON schema."""

import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel


class Color(BaseModel):
    color: Literal["red", "green"]


client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=120)
client = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
color = client.chat.completions.create(
    model="default",
    messages=[{"role": "user", "content": "Name a color."}],
    max_tokens=40,
    temperature=0,
    max_retries=0,
    response_model=Color,
)
assert color.color in ("red", "green"), color
print("instructor ok:", color)
