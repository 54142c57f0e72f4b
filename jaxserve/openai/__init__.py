"""OpenAI's completions and chats: from a request's body to prompts and parameters, from outputs to a response's bodies.

No endpoint knows where bodies come from: a file, or HTTP.
"""

from jaxserve.openai.chat import ChatCompletions
from jaxserve.openai.completions import Completions
from jaxserve.openai.endpoint import Ask, Endpoint, Response

__all__ = ["CHAT", "COMPLETIONS", "ENDPOINTS", "Ask", "Endpoint", "Response"]

CHAT, COMPLETIONS = ChatCompletions(), Completions()
ENDPOINTS: tuple[Endpoint, ...] = (CHAT, COMPLETIONS)
