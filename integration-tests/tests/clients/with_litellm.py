"""LiteLLM: asked, streamed, asynchronously, and what it makes of a request that does not fit."""

import asyncio
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # It asks a server of its own at start else.
import litellm

ask = {
    "model": "openai/default",
    "api_base": sys.argv[1],
    "api_key": "none",
    "messages": [{"role": "user", "content": "Name three colors."}],
    "max_tokens": 8,
    "temperature": 0,
    "timeout": 120,
    "num_retries": 0,
}
done = litellm.completion(**ask)
answer = done.choices[0].message.content
assert answer and done.usage.completion_tokens > 0, done
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, stream=True))
assert streamed == answer, (streamed, answer)
assert asyncio.run(litellm.acompletion(**ask)).choices[0].message.content == answer
try:
    litellm.completion(**{**ask, "messages": [{"role": "user", "content": "word " * 5000}]})
except litellm.exceptions.BadRequestError as error:
    assert "KV cache holds" in str(error), error
else:
    raise AssertionError("5000 words fit into the pool")
print("litellm ok:", answer)
