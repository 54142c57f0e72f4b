"""The bodies of requests as JSON Schema, for the description that the HTTP door gives of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.openai.formats import TYPES
from jaxserve.openai.responses import TEXT_PARTS
from jaxserve.openai.tools import MAX_TOOLS
from jaxserve.sampling_params import (
    MAX_BAD_WORD_CHARACTERS,
    MAX_BAD_WORDS,
    MAX_CACHE_SALT_CHARACTERS,
    MAX_CHOICES,
    MAX_INT32,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_PRIORITY,
    MAX_SEED,
    MAX_STOP_STRINGS,
)
from jaxserve.structured_outputs import MAX_CHOICES as MAX_STRINGS

BOOLEAN: dict[str, Any] = {"type": ["boolean", "null"]}
TOKEN_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
STRUCTURED_OUTPUTS: dict[str, Any] = {
    "type": ["object", "null"], "maxProperties": 1, "minProperties": 1,
    "properties": {
        "json": {"type": ["object", "string"], "description": "A JSON Schema."},
        "regex": {"type": "string"},
        "choice": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_STRINGS},
        "grammar": {"type": "string", "description": "In Lark's syntax or GBNF's."},
        "json_object": {"type": "boolean"},
        "structural_tag": {"type": ["object", "string"]},
    },
}  # fmt: skip
RESPONSE_FORMAT: dict[str, Any] = {
    "type": ["object", "null"], "required": ["type"],
    "properties": {
        "type": {"enum": list(TYPES)},
        "json_schema": {
            "type": "object", "required": ["schema"],
            "properties": {"name": {"type": "string"}, "schema": {"type": "object"}, "strict": BOOLEAN},
        },
    },
}  # fmt: skip
SAMPLING: dict[str, dict[str, Any]] = {
    "model": {"type": ["string", "null"], "description": "One of the names that /v1/models lists."},
    "stream": BOOLEAN,
    "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 100},
    "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"type": ["integer", "null"], "minimum": -1, "description": "0 or -1 keeps the whole vocabulary."},
    "min_p": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
    "presence_penalty": {"type": ["number", "null"], "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": ["number", "null"], "minimum": -2, "maximum": 2},
    "repetition_penalty": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 100},
    "logit_bias": {
        "type": ["object", "null"], "maxProperties": MAX_LOGIT_BIAS, "propertyNames": {"pattern": "^[0-9]+$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "allowed_token_ids": {"anyOf": [{"type": "null"}, TOKEN_IDS]},
    "bad_words": {
        "type": ["array", "null"], "maxItems": MAX_BAD_WORDS,
        "items": {"type": "string", "minLength": 1, "maxLength": MAX_BAD_WORD_CHARACTERS},
    },
    "min_tokens": {"type": ["integer", "null"], "minimum": 0},
    "seed": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_SEED},
    "stop": {
        "anyOf": [
            {"type": "null"}, {"type": "string", "minLength": 1},
            {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOP_STRINGS},
        ]
    },
    "stop_token_ids": {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0}},
    "ignore_eos": BOOLEAN,
    "truncate_prompt_tokens": {
        "type": ["integer", "null"], "minimum": -1,
        "description": "So many of the prompt's last tokens are taken; -1: those that leave room for max_tokens.",
    },
    "skip_special_tokens": BOOLEAN,
    "spaces_between_special_tokens": BOOLEAN,
    "include_stop_str_in_output": BOOLEAN,
    "cache_salt": {"type": ["string", "null"], "minLength": 1, "maxLength": MAX_CACHE_SALT_CHARACTERS},
    "priority": {
        "type": ["integer", "null"], "minimum": -MAX_PRIORITY, "maximum": MAX_PRIORITY,
        "description": "Lower goes first.",
    },
    "num_speculative_tokens": {
        "type": ["integer", "null"], "minimum": 0, "maximum": MAX_INT32,
        "description": "Most drafts of a step, where the server makes any; 0: none.",
    },
    "structured_outputs": STRUCTURED_OUTPUTS,
    "user": {"type": ["string", "null"]},
}  # fmt: skip
"""What every endpoint takes."""
MAX_TOKENS: dict[str, Any] = {"type": ["integer", "null"], "minimum": 1}
COMMON: dict[str, dict[str, Any]] = {
    **SAMPLING,
    "n": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_CHOICES},
    "best_of": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_CHOICES},
    "stream_options": {
        "type": ["object", "null"], "properties": {"include_usage": BOOLEAN, "continuous_usage_stats": BOOLEAN},
    },
    "max_tokens": MAX_TOKENS,
    "response_format": RESPONSE_FORMAT,
}  # fmt: skip
"""Of endpoints with choices."""
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


def _message(*types: str) -> dict[str, Any]:
    """One whose content is a text or parts of these types."""
    part = {
        "type": "object", "required": ["type", "text"],
        "properties": {"type": {"enum": list(types)}, "text": {"type": "string"}},
    }  # fmt: skip
    content = {"anyOf": [{"type": "string"}, {"type": "array", "items": part}]}
    return {
        "type": "object", "required": ["role", "content"],
        "properties": {"role": {"type": "string"}, "content": content},
    }  # fmt: skip


MESSAGE = _message("text")
TEMPLATE: dict[str, dict[str, Any]] = {
    "add_generation_prompt": BOOLEAN,
    "continue_final_message": BOOLEAN,
    "chat_template_kwargs": {"type": ["object", "null"]},
}
"""What chat templates are rendered with."""
TOOL: dict[str, Any] = {
    "type": "object", "required": ["type", "function"],
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object", "required": ["name"],
            "properties": {
                "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
                "description": {"type": ["string", "null"]},
                "parameters": {"type": ["object", "null"]},
                "strict": BOOLEAN,
            },
        },
    },
}  # fmt: skip
CHAT: dict[str, dict[str, Any]] = {
    "messages": {"type": "array", "items": MESSAGE, "minItems": 1},
    "max_completion_tokens": MAX_TOKENS,
    "logprobs": BOOLEAN,
    "top_logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_LOGPROBS},
    "tools": {"type": ["array", "null"], "items": TOOL, "maxItems": MAX_TOOLS},
    "tool_choice": {"anyOf": [{"enum": ["none", "auto", "required", None]}, {"type": "object"}]},
    "parallel_tool_calls": BOOLEAN,
    **TEMPLATE,
}
RESPONSE: dict[str, dict[str, Any]] = {
    "input": {"anyOf": [{"type": "string"}, {"type": "array", "items": _message(*TEXT_PARTS), "minItems": 1}]},
    "instructions": {"type": ["string", "null"]},
    "max_output_tokens": MAX_TOKENS,
    "text": {"type": ["object", "null"], "properties": {"format": RESPONSE_FORMAT}},
    **TEMPLATE,
}
TOKENIZE: dict[str, dict[str, Any]] = {
    "model": COMMON["model"],
    "prompt": {"type": ["string", "null"], "description": "Or messages."},
    "messages": {"type": ["array", "null"], "items": MESSAGE, "minItems": 1},
    "return_token_strs": BOOLEAN,
    **TEMPLATE,
}
DETOKENIZE: dict[str, dict[str, Any]] = {"model": COMMON["model"], "tokens": TOKEN_IDS}


def body(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    """What a FastAPI route takes as ``openapi_extra``, of a JSON object with these properties and no others."""
    schema = {
        "type": "object", "properties": dict(properties), "required": list(required), "additionalProperties": False,
    }  # fmt: skip
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
