"""LangChain's ChatOpenAI: invoke and stream."""

from __future__ import annotations

import json
import sys

from langchain_openai import ChatOpenAI

settings = json.loads(sys.argv[1])
chat = ChatOpenAI(
    model=settings["model"], base_url=settings["base_url"], api_key="none", temperature=0, max_tokens=12, max_retries=0
)
QUESTION = "What is the capital of France?"
answer = chat.invoke(QUESTION)
assert "Paris" in answer.content, answer
assert answer.usage_metadata["output_tokens"] <= 12, answer
chunks = list(chat.stream(QUESTION))
assert len(chunks) > 3, chunks
assert "".join(chunk.content for chunk in chunks) == answer.content, chunks
