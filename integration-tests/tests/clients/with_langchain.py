"""LangChain: asked, streamed, in a batch, asynchronously, and what it makes of a request that does not fit."""

import asyncio
import sys

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

model = ChatOpenAI(base_url=sys.argv[1], api_key="none", model="default", max_tokens=8, temperature=0, max_retries=0, timeout=120)
asked = [SystemMessage("You are a helpful assistant."), HumanMessage("Name three colors.")]
answer = model.invoke(asked)
assert answer.content and answer.usage_metadata["output_tokens"] > 0, answer
assert "".join(chunk.content for chunk in model.stream(asked)) == answer.content
assert [a.content for a in model.batch([asked] * 3)] == [answer.content] * 3
assert asyncio.run(model.ainvoke(asked)).content == answer.content
try:
    model.invoke("word " * 5000)
except Exception as error:
    assert "KV cache holds" in str(error), error
else:
    raise AssertionError("5000 words fit into the pool")
print("langchain ok:", answer.content)
