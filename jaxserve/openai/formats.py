"""What bodies say of the form of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.json_schema import check_schema
from jaxserve.openai.fields import take_object

TYPES = ("text", "json_object", "json_schema", "structural_tag")


def take_structured_outputs(given: dict[str, Any]) -> dict[str, Any]:
    """Take ``response_format`` and vLLM's ``structured_outputs`` out of a body; empty where the answer is free."""
    asked, found = take_object(given, "structured_outputs"), take_object(given, "response_format")
    wanted = structured_outputs("response_format", found) if found else {}
    if asked and wanted:
        raise RequestError(f"response_format must be left out with structured_outputs, got {found!r:.80}")
    return asked or wanted


def structured_outputs(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What a format, which errors call ``name``, asks of outputs. Raises RequestError."""
    match found.get("type"):
        case "text":
            return {}
        case "json_object":
            return {"json_object": True}
        case "json_schema":
            # In /v1/responses the format is the schema's description, too.
            inner = found.get("json_schema", found)
            where = f"{name}.json_schema" if "json_schema" in found else name
            if not isinstance(inner, Mapping) or "schema" not in inner:
                raise RequestError(f"{where} must be {{'name': ..., 'schema': ...}}, got {inner!r:.80}")
            return {"json": check_schema(f"{where}.schema", inner["schema"])}
        case "structural_tag":
            return {"structural_tag": {key: value for key, value in found.items() if key != "type"}}
    raise RequestError(f"{name}.type must be one of {', '.join(TYPES)}, got {found.get('type')!r:.80}")
