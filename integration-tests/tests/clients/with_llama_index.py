"""LlamaIndex: completion and chat, streamed and not, asynchronously."""

import asyncio
import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

model = OpenAILike(model="default", api_base=sys.argv[1], api_key="none", is_chat_model=True, max_tokens=8, temperature=0, timeout=120, max_retries=0)
asked = [ChatMessage(role="user", content="Name three colors.")]
answer = model.chat(asked).message.content
assert answer
assert [chunk.message.content for chunk in model.stream_chat(asked)][-1] == answer
assert asyncio.run(model.achat(asked)).message.content == answer
assert model.complete("Name three colors.").text == answer
plain = OpenAILike(model="default", api_base=sys.argv[1], api_key="none", is_chat_model=False, max_tokens=6, temperature=0, timeout=120, max_retries=0)
assert plain.complete("One, two, three,").text
print("llama-index ok:", answer)
