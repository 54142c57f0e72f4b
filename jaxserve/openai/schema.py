"""The bodies of requests as JSON Schema, for the description that the HTTP door gives of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.openai.endpoint import MAX_CHOICES
from jaxserve.request import MAX_LOGPROBS, MAX_SEED, MAX_STOP_STRINGS

BOOLEAN: dict[str, Any] = {"type": ["boolean", "null"]}
TOKEN_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
COMMON: dict[str, dict[str, Any]] = {
    "model": {"type": ["string", "null"], "description": "One of the names that /v1/models lists."},
    "n": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_CHOICES},
    "stream": BOOLEAN,
    "stream_options": {
        "type": ["object", "null"], "properties": {"include_usage": BOOLEAN, "continuous_usage_stats": BOOLEAN},
    },
    "max_tokens": {"type": ["integer", "null"], "minimum": 1},
    "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 100},
    "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"type": ["integer", "null"], "minimum": -1, "description": "0 or -1 keeps the whole vocabulary."},
    "min_p": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
    "seed": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_SEED},
    "stop": {
        "anyOf": [
            {"type": "null"}, {"type": "string", "minLength": 1},
            {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOP_STRINGS},
        ]
    },
    "stop_token_ids": {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0}},
    "ignore_eos": BOOLEAN,
    "skip_special_tokens": BOOLEAN,
    "include_stop_str_in_output": BOOLEAN,
    "user": {"type": ["string", "null"]},
}  # fmt: skip
COMPLETION: dict[str, dict[str, Any]] = {
    "prompt": {
        "anyOf": [
            {"type": "string"}, TOKEN_IDS,
            {"type": "array", "items": {"anyOf": [{"type": "string"}, TOKEN_IDS]}, "minItems": 1},
        ]
    },
    "echo": BOOLEAN,
    "logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_LOGPROBS},
}  # fmt: skip
MESSAGE: dict[str, Any] = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"type": "string"},
        "content": {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {
                    "type": "object", "required": ["type", "text"],
                    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                }},
            ]
        },
    },
}  # fmt: skip
CHAT: dict[str, dict[str, Any]] = {
    "messages": {"type": "array", "items": MESSAGE, "minItems": 1},
    "max_completion_tokens": {"type": ["integer", "null"], "minimum": 1},
    "logprobs": BOOLEAN,
    "top_logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_LOGPROBS},
}

TOKENIZE: dict[str, dict[str, Any]] = {
    "model": COMMON["model"],
    "prompt": {"type": ["string", "null"], "description": "Or messages."},
    "messages": {"type": ["array", "null"], "items": MESSAGE, "minItems": 1},
    "return_token_strs": BOOLEAN,
}
DETOKENIZE: dict[str, dict[str, Any]] = {"model": COMMON["model"], "tokens": TOKEN_IDS}


def body(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    """What a FastAPI route takes as ``openapi_extra``, of a JSON object with these properties and no others."""
    schema = {
        "type": "object", "properties": dict(properties), "required": list(required), "additionalProperties": False,
    }  # fmt: skip
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
