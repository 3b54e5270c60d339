"""The official OpenAI client, as its users write it today: asynchronous, streamed, and with errors."""

import asyncio
import sys

import openai

url = sys.argv[1]
settings = {"base_url": url, "api_key": "none", "max_retries": 0, "timeout": 120}
client = openai.OpenAI(**settings)
messages = [{"role": "user", "content": "Name three colors."}]
chat = {"model": "default", "messages": messages, "max_tokens": 8, "temperature": 0}
answer = client.chat.completions.create(**chat).choices[0].message.content
assert answer


async def several() -> None:
    """Eight at once, half of them streamed: all answer as one alone."""
    async with openai.AsyncOpenAI(**settings) as client:

        async def whole() -> str:
            done = await client.chat.completions.create(**chat)
            return done.choices[0].message.content

        async def streamed() -> str:
            text = ""
            async for chunk in await client.chat.completions.create(**chat, stream=True):
                text += chunk.choices[0].delta.content or "" if chunk.choices else ""
            return text

        answers = await asyncio.gather(*(ask() for ask in [whole, streamed] * 4))
        assert answers == [answer] * 8, answers
        assert any([model.id == "default" async for model in client.models.list()])
        try:
            await client.chat.completions.create(**{**chat, "messages": [{"role": "user", "content": "word " * 5000}]})
        except openai.APIStatusError as error:
            assert "KV cache holds" in str(error), error
        else:
            raise AssertionError("5000 words fit into the pool")


asyncio.run(several())

with client.chat.completions.stream(**chat) as events:
    text = "".join(event.delta for event in events if event.type == "content.delta")
    assert text == answer, (text, answer)
    # The whole answer, put together by the client; it refuses to call one final that ran out of tokens.
    assert events.current_completion_snapshot.choices[0].message.content == answer

print("openai", openai.__version__, "ok:", answer)
