"""Hostile HTTP requests: bodies near to those that are served, with wrong values, and what is no body at all."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from hypothesis import strategies as st

from jaxserve.openai import schema
from tests.server.grpc_fuzz import CALL_SECONDS, FLOATS, WORDS

FAULT = b"internal_server_error"
"""Also in the events of a stream, which has begun with a 200."""
SAMPLING = {"max_tokens": 3, "temperature": 1, "ignore_eos": True}
SEEDS: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": "abc", "stream": True, "logprobs": 1, **SAMPLING},
        {"prompt": [[97, 98], [99]], "echo": True, "n": 2, "logprobs": 0, **SAMPLING},
    ],
    "/v1/chat/completions": [
        {"messages": [{"role": "user", "content": "abc"}], "stream": True, **SAMPLING},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "abc"}]}], "logprobs": True, **SAMPLING},
    ],
    "/tokenize": [{"prompt": "abc", "return_token_strs": True}, {"messages": [{"role": "user", "content": "abc"}]}],
    "/detokenize": [{"tokens": [97, 98]}],
}
FIELDS = sorted({*schema.COMMON, *schema.COMPLETION, *schema.CHAT, *schema.TOKENIZE, *schema.DETOKENIZE, "tools"})
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.sampled_from([*WORDS, "\ud800"]), st.sampled_from(FLOATS),
        st.sampled_from([-1, 0, 1, 2, 97, 129]), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from([*FIELDS, "role", "content"]), inner, max_size=4)
    ),
    max_leaves=6,
)  # fmt: skip

Request = tuple[str, bytes]


@st.composite
def requests(draw: Callable[..., Any]) -> Request:
    """A path and a body."""
    path = draw(st.sampled_from(list(SEEDS)))
    if draw(st.integers(0, 9)) == 9:
        return path, draw(st.binary(max_size=100))
    body = dict(draw(st.sampled_from(SEEDS[path])))
    for name in draw(st.lists(st.sampled_from([*FIELDS, *body]), max_size=3)):
        body[name] = draw(VALUES)
    return path, json.dumps(body).encode()  # with NaN and lone surrogates, which are no JSON


def check(url: str, request: Request) -> int:
    """Make the request; its answer must come in time, and be no fault of the server."""
    path, body = request
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=CALL_SECONDS)
    try:
        connection.request("POST", path, body)
        response = connection.getresponse()
        answer = response.read()
    finally:
        connection.close()
    assert response.status < 500, f"{response.status} {answer!r:.300} for {request}"
    assert FAULT not in answer, f"{answer!r:.1000} for {request}"
    return response.status
