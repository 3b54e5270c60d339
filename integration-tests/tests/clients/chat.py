"""The official OpenAI client against the server: what its users do, and what it makes of errors."""

import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=120)

messages = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Name three colors."},
]
chat = {"model": "default", "messages": messages, "max_tokens": 16, "temperature": 0}

done = client.chat.completions.create(**chat)
answer = done.choices[0].message.content
assert answer and done.usage.completion_tokens > 0, done
assert done.choices[0].finish_reason in ("stop", "length"), done

streamed = ""
for chunk in client.chat.completions.create(**chat, stream=True):
    streamed += chunk.choices[0].delta.content or ""
assert streamed == answer, (streamed, answer)

# A conversation: the first answer is a part of the second prompt.
messages += [
    {"role": "assistant", "content": answer},
    {"role": "user", "content": "And three animals."},
]
again = client.chat.completions.create(**chat)
assert again.usage.prompt_tokens > done.usage.prompt_tokens, again

two = client.chat.completions.create(**chat, n=2)
assert len(two.choices) == 2, two

text = client.completions.create(model="default", prompt="One, two, three,", max_tokens=6, temperature=0)
assert text.choices[0].text, text

schema = {
    "type": "object",
    "properties": {"color": {"type": "string", "enum": ["red", "green"]}},
    "required": ["color"],
    "additionalProperties": False,
}
shape = {"type": "json_schema", "json_schema": {"name": "color", "schema": schema}}
red = client.chat.completions.create(**{**chat, "max_tokens": 40}, response_format=shape)
assert '"color"' in red.choices[0].message.content, red

with client.chat.completions.create(**{**chat, "max_tokens": 500}, stream=True) as stream:
    next(iter(stream))  # And away.

try:
    client.chat.completions.create(**{**chat, "messages": [{"role": "user", "content": "word " * 5000}]})
except openai.APIStatusError as error:
    assert "KV cache holds" in str(error), error
else:
    raise AssertionError("5000 words fit into the pool")

assert any(model.id == "default" for model in client.models.list().data)
print("openai", openai.__version__, "ok:", answer)
