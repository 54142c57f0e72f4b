"""The paths of the HTTP door, and what serves each."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

import orjson
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from jaxserve.errors import RequestError
from jaxserve.openai import CHAT, COMPLETIONS, RESPONSES, schema
from jaxserve.openai.chat import take_template_options
from jaxserve.openai.fields import take_switch
from jaxserve.prompts import ParsedPrompt
from jaxserve.served_model import ServedModel
from jaxserve.server.admission import Admission
from jaxserve.server.calls import Calls
from jaxserve.server.config import ServerConfig
from jaxserve.server.errors import UnavailableError
from jaxserve.server.http.door import Door
from jaxserve.server.http.errors import failure_of
from jaxserve.server.http.exchange import read_body
from jaxserve.server.http.generate import Answer
from jaxserve.server.http.page import add_page
from jaxserve.server.http.profile import add_profiling
from jaxserve.server.http.steps import integer, recent_steps
from jaxserve.server.http.trace import DEFAULT_TRACED_STEPS, MAX_TRACED_STEPS, trace_next_steps
from jaxserve.server.keys import Keys
from jaxserve.server.text_threads import TextThreads


def make_app(
    config: ServerConfig,
    admission: Admission,
    texts: TextThreads,
    registry: CollectorRegistry,
    calls: Calls,
    keys: Keys,
) -> FastAPI:
    """OpenAI's paths and vLLM's to what ``admission`` leads to, and a page. Raises ConfigError."""
    max_body_bytes = config.max_message_bytes
    app = FastAPI(title="jaxserve", version=version("jaxserve"), docs_url=None, redoc_url=None)
    app.add_middleware(Door, keys=keys, calls=calls)
    if config.cors_origins:
        # Around the door: what a browser asks in advance comes without a key.
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )  # fmt: skip
    app.add_exception_handler(HTTPException, _respond_failure)
    for endpoint, properties, required in (
        (CHAT, schema.COMMON | schema.CHAT, "messages"),
        (COMPLETIONS, schema.COMMON | schema.COMPLETION, "prompt"),
        (RESPONSES, schema.SAMPLING | schema.RESPONSE, "input"),
    ):
        answer = partial(Answer, endpoint, admission, texts, max_body_bytes)
        described = schema.body(properties, required)
        app.add_api_route(endpoint.path, _handler(answer), methods=["POST"], openapi_extra=described)

    async def in_thread(request: Request, work: Callable[[dict[str, Any], ServedModel], dict[str, Any]]) -> Response:
        replicas = admission.replicas()
        body, num_bytes = await read_body(request.receive, max_body_bytes)
        if body.get("model") is not None:
            replicas.model.check_name(body["model"])
        return _json(await texts.run(partial(work, body, replicas.model), num_bytes))

    @app.post("/tokenize", openapi_extra=schema.body(schema.TOKENIZE))
    async def tokenize(request: Request) -> Response:
        return await in_thread(request, _tokenize)

    @app.post("/detokenize", openapi_extra=schema.body(schema.DETOKENIZE, "tokens"))
    async def detokenize(request: Request) -> Response:
        return await in_thread(request, _detokenize)

    @app.get("/v1/models")
    async def models() -> Response:
        model = admission.replicas().model
        return _json({"object": "list", "data": [_model_card(name, model) for name in model.names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        served = admission.replicas(name).model
        return _json(_model_card(name, served))

    @app.get("/health")
    async def health() -> Response:
        if admission.failed.is_set():
            raise UnavailableError("the engine has stopped")
        return Response()

    @app.get("/ready")
    async def ready() -> Response:
        if not admission.is_ready:
            raise UnavailableError("the server is warming up or draining")
        return Response()

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def show_version() -> Response:
        return _json({"version": app.version})

    @app.get("/debug/steps")
    async def steps(request: Request) -> Response:
        return _json(recent_steps(admission.replicas().recent, request.query_params))

    @app.get("/debug/trace")
    async def trace(request: Request) -> Response:
        engines, query = admission.replicas().engines, request.query_params
        engine = engines[integer(query, "engine", len(engines) - 1)]
        num_steps = integer(query, "steps", MAX_TRACED_STEPS, low=1, default=DEFAULT_TRACED_STEPS)
        return Response(await trace_next_steps(engine, num_steps), media_type="application/json")

    add_profiling(app, config.profiler_dir)
    add_page(app)
    return app


def _handler(answer: Callable[[], Answer]) -> Callable[[], Any]:
    async def handle() -> Response:
        return answer()

    return handle


async def _respond_failure(request: Request, error: Exception) -> Response:
    """For what FastAPI itself raises, and would answer in a shape of its own."""
    return failure_of(error).response()


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), HTTPStatus.OK, media_type="application/json")


STARTED = int(time.time())


def _model_card(name: str, model: ServedModel) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": STARTED,
        "owned_by": "jaxserve",
        "root": model.names[0],
        "parent": None,
        "max_model_len": model.max_model_len,
    }


def _tokenize(body: dict[str, Any], model: ServedModel) -> dict[str, Any]:
    given = {name: value for name, value in body.items() if value is not None and name != "model"}
    with_strings = take_switch(given, "return_token_strs")
    options = take_template_options(given)
    prompt = ParsedPrompt(given.pop("prompt", None), messages=given.pop("messages", None), template_options=options)
    if (prompt.text is None) == (prompt.messages is None) or not isinstance(prompt.text, str | None):
        raise RequestError(f"prompt must be a text, or messages a list, and not both, got {body!r:.80}")
    if given:
        raise RequestError(
            f"unknown parameter {min(given)!r} for /tokenize; known: {', '.join(sorted(schema.TOKENIZE))}"
        )
    token_ids = model.token_ids(prompt, model.text_limit)
    strings = [model.tokenizer.token(token_id) for token_id in token_ids] if with_strings else None
    return {"count": len(token_ids), "max_model_len": model.max_model_len, "tokens": token_ids, "token_strs": strings}


def _detokenize(body: dict[str, Any], model: ServedModel) -> dict[str, Any]:
    token_ids = body.get("tokens")
    if not isinstance(token_ids, list) or not all(type(token_id) is int for token_id in token_ids):
        raise RequestError(f"tokens must be a list of token ids, got {token_ids!r:.80}")
    if len(token_ids) > model.text_limit.num_tokens:
        raise RequestError(
            f"tokens of {len(token_ids)} items exceeds {model.text_limit.name} {model.text_limit.num_tokens}"
        )
    return {"prompt": model.text(token_ids, skip_special_tokens=False)}
