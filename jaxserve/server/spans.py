"""A span for every request, for OpenTelemetry, named by its GenAI conventions and, where these have no name, as vLLM's.

The packages are those of the extra ``otel``, and imported only where spans are asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING

from jaxserve.errors import ConfigError
from jaxserve.request import FinishReason, RequestDelta, RequestMetrics
from jaxserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from opentelemetry.trace import Span

type Headers = Iterable[tuple[str | bytes, str | bytes]]

TRACE_HEADERS = ("traceparent", "tracestate", "baggage")
caller_headers: ContextVar[Headers] = ContextVar("caller_headers", default=())
"""HTTP headers or gRPC metadata of the call that a task serves, names in lower case; set by the doors."""
FLUSH_SECONDS = 2.0


class Spans:
    """Makes spans and sends them to ``endpoint`` from a thread of its own, which nobody waits for: what cannot be sent
    is dropped. OpenTelemetry's variables apply, OTEL_SERVICE_NAME or OTEL_TRACES_SAMPLER.

    Raises ConfigError where the packages are missing.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                f"otlp_traces_endpoint needs the packages of the extra 'otel', pip install 'jaxserve[otel]': {error}"
            ) from None
        resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "jaxserve")})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("jaxserve")

    async def around(
        self,
        deltas: AsyncGenerator[RequestDelta, None],
        model_name: str,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
    ) -> AsyncGenerator[RequestDelta, None]:
        """``deltas``, in a span from now to their end, an error or an abort; below the caller's span."""
        span = self._begin(model_name, request_id, len(prompt_token_ids), params)
        num_output_tokens, last, failure = 0, None, None
        try:
            async with contextlib.aclosing(deltas):
                async for last in deltas:
                    num_output_tokens += len(last.token_ids)
                    yield last
        except Exception as error:
            failure = error
            raise
        finally:
            span.set_attribute("gen_ai.usage.output_tokens", num_output_tokens)
            if last is not None:
                span.set_attributes(_latencies(last.metrics))
            if failure is not None:
                _set_failed(span, failure)
            else:
                # Who closes this before the last delta aborts the request.
                reason = last.finish_reason if last is not None else None
                span.set_attribute("gen_ai.response.finish_reasons", (reason or FinishReason.ABORT,))
            span.end()

    async def close(self) -> None:
        """Send what is left, as far as that goes within a moment."""
        thread = threading.Thread(target=self._provider.shutdown, name="spans-flush", daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, FLUSH_SECONDS)

    def _begin(self, model_name: str, request_id: str, num_prompt_tokens: int, params: SamplingParams) -> Span:
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        asked = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "jaxserve",
            "gen_ai.request.model": model_name,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.response.id": request_id,
            "gen_ai.usage.input_tokens": num_prompt_tokens,
        }
        return self._tracer.start_span(
            f"text_completion {model_name}",
            context=extract({_text(name): _text(value) for name, value in caller_headers.get()}),
            kind=SpanKind.SERVER,
            attributes={name: value for name, value in asked.items() if value is not None},
        )


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


def _set_failed(span: Span, error: Exception) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute("error.type", type(error).__qualname__)
    span.record_exception(error)
    span.set_status(StatusCode.ERROR, str(error))


def _latencies(times: RequestMetrics) -> dict[str, float]:
    """In seconds, as far as the request has come."""
    latencies = {"gen_ai.latency.time_in_queue": times.scheduling_delay_seconds}
    if times.token_seconds and times.first_scheduled_seconds is not None:
        first_seconds, last_seconds = times.token_seconds[0], times.token_seconds[-1]
        latencies |= {
            "gen_ai.server.time_to_first_token": times.ttft_seconds,
            "gen_ai.latency.time_in_model_prefill": first_seconds - times.first_scheduled_seconds,
            "gen_ai.latency.time_in_model_decode": last_seconds - first_seconds,
            "gen_ai.latency.time_in_model_inference": last_seconds - times.first_scheduled_seconds,
            "gen_ai.latency.e2e": last_seconds - times.arrival_seconds,
        }
    return {name: seconds for name, seconds in latencies.items() if seconds is not None}
