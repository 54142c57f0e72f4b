"""The settings of the server's doors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from jaxserve.config import Headings, check_readable, option
from jaxserve.errors import ConfigError

LOG_FORMATS = ("text", "json")
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s*]+")
"""A scheme, a host and perhaps a port, as browsers write them."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The server's doors. Raises ConfigError."""

    HEADINGS: ClassVar[Headings] = {
        "host": "doors", "max_waiting": "limits", "api_key_file": "security", "drain_seconds": "operations",
        "metrics_port": "observability", "data_parallel": "parallelism",
    }  # fmt: skip

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(50051, "gRPC port; 0 picks a free one")
    grpc_uds: str | None = option(None, "path of a Unix socket for gRPC instead of port, without TLS")
    http_port: int | None = option(None, "port of OpenAI's API over HTTP; 0 picks a free one; none by default")
    uds: str | None = option(None, "path of a Unix socket for HTTP instead of http_port, without TLS")
    served_model_name: str | None = option(
        None, "what requests may call the model, several names apart by commas; what it was started as by default"
    )
    max_waiting: int = option(1024, "requests in flight before new ones are refused: RESOURCE_EXHAUSTED, 429")
    max_waiting_per_key: int | None = option(
        None, "requests in flight of one API key before more of its are refused; none by default"
    )
    max_message_bytes: int = option(16 * 1024 * 1024, "largest gRPC message or HTTP body")
    api_key_file: str | None = option(
        None,
        "keys of which every call but health needs one, one in a line, read again on SIGHUP; also those of "
        "the variable JAXSERVE_API_KEYS",
    )
    ssl_certfile: str | None = option(None, "certificate chain (PEM), for TLS on both ports")
    ssl_keyfile: str | None = option(None, "its private key (PEM)")
    ssl_ca_certs: str | None = option(None, "authorities (PEM) of one of which clients need a certificate, for mTLS")
    allowed_origins: str | None = option(
        None, "origins whose pages may call over HTTP (CORS), apart by commas, or *; none by default"
    )
    drain_seconds: float = option(30.0, "how long SIGTERM waits for running requests")
    step_timeout_seconds: float = option(120.0, "a step that takes longer hangs: the server ends with exit code 1")
    metrics_port: int | None = option(None, "port of a Prometheus endpoint without keys or TLS; none by default")
    log_format: str = option("text", "of the log: lines of text, or JSON objects, one in a line", LOG_FORMATS)
    otlp_traces_endpoint: str | None = option(
        None, "URL of an OpenTelemetry collector (OTLP over gRPC) that gets a span for every request; needs extra otel"
    )
    profiler_dir: str | None = option(
        None, "folder for what jax's profiler writes; with it POST /start_profile and /stop_profile are served"
    )
    data_parallel: int = option(1, "engines, on devices of their own; requests go to the one with the fewest")

    def __post_init__(self) -> None:
        for name in ("port", "http_port", "metrics_port"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 65535:
                raise ConfigError(f"{name} must be in [0, 65535], got {value}")
        if self.uds is not None and self.http_port is not None:
            raise ConfigError(f"uds stands for http_port, got both, {self.uds!r} and {self.http_port}")
        for name in ("uds", "grpc_uds"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name} must not be empty")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError(
                f"ssl_certfile and ssl_keyfile must be given together, got {self.ssl_certfile!r} and "
                f"{self.ssl_keyfile!r}"
            )
        if self.ssl_ca_certs is not None and self.ssl_certfile is None:
            raise ConfigError(f"ssl_ca_certs needs ssl_certfile, got {self.ssl_ca_certs!r} without")
        check_readable(self, "ssl_certfile", "ssl_keyfile", "ssl_ca_certs")
        if self.otlp_traces_endpoint is not None and not re.match(r"https?://[^/]", self.otlp_traces_endpoint):
            raise ConfigError(
                f"otlp_traces_endpoint must be a URL such as http://localhost:4317, got {self.otlp_traces_endpoint!r}"
            )
        if self.profiler_dir is not None and not self.has_http:
            raise ConfigError(f"profiler_dir needs http_port or uds, got {self.profiler_dir!r} without")
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(f"log_format must be one of {', '.join(LOG_FORMATS)}, got {self.log_format!r}")
        for name in ("max_waiting", "max_waiting_per_key", "max_message_bytes", "data_parallel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not self.drain_seconds >= 0:
            raise ConfigError(f"drain_seconds must not be negative, got {self.drain_seconds}")
        if not self.step_timeout_seconds > 0:
            raise ConfigError(f"step_timeout_seconds must be positive, got {self.step_timeout_seconds}")
        if self.served_model_name is not None and not all(self.served_model_names):
            raise ConfigError(f"served_model_name must be names apart by commas, got {self.served_model_name!r}")
        if not all(origin == "*" or ORIGIN.fullmatch(origin) for origin in self.cors_origins):
            raise ConfigError(
                "allowed_origins must be * or origins like https://example.org:8443 apart by commas, "
                f"got {self.allowed_origins!r}"
            )

    @property
    def has_http(self) -> bool:
        return self.http_port is not None or self.uds is not None

    @property
    def cors_origins(self) -> tuple[str, ...]:
        return () if self.allowed_origins is None else tuple(self.allowed_origins.split(","))

    @property
    def served_model_names(self) -> tuple[str, ...]:
        return () if self.served_model_name is None else tuple(self.served_model_name.split(","))
