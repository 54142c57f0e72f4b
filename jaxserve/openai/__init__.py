"""OpenAI's endpoints: from a request's body to prompts and parameters, from outputs to a response's bodies.

No endpoint knows where bodies come from: a file, or HTTP.
"""

from jaxserve.openai.chat import ChatCompletions
from jaxserve.openai.completions import Completions
from jaxserve.openai.endpoint import Ask, Endpoint
from jaxserve.openai.response import Response
from jaxserve.openai.responses import Responses

__all__ = ["CHAT", "COMPLETIONS", "ENDPOINTS", "RESPONSES", "Ask", "Endpoint", "Response"]

CHAT, COMPLETIONS, RESPONSES = ChatCompletions(), Completions(), Responses()
ENDPOINTS: tuple[Endpoint, ...] = (CHAT, COMPLETIONS, RESPONSES)
