"""What comes of a line, whoever serves it."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from http import HTTPStatus
from typing import Any, NamedTuple, Protocol

from jaxserve.batch.lines import BatchLine


class Answer(NamedTuple):
    """A response's body, or an error of ``code`` and ``message``."""

    line: BatchLine
    status_code: int
    body: dict[str, Any] | None = None
    error: dict[str, str] | None = None

    @classmethod
    def refusal(cls, line: BatchLine, message: str) -> Answer:
        """Of a line that cannot be served as it is."""
        return cls(line, HTTPStatus.BAD_REQUEST, error={"code": "invalid_request", "message": message})

    def result(self) -> dict[str, Any]:
        """As the output has it."""
        response = {"status_code": int(self.status_code), "request_id": self.line.id, "body": self.body}
        return {"id": self.line.id, "custom_id": self.line.custom_id, "response": response, "error": self.error}


class BatchServer(Protocol):
    """Who serves lines: an engine here, or a server elsewhere."""

    budget_use: float | None
    """The share of its steps' token budgets that was used, where that is known."""

    def answers(self, lines: Iterator[BatchLine]) -> Generator[list[Answer]]:
        """Serve all lines, a bounded number at once: the answers as they come, often none, so that whoever closes the
        generator need not wait. Nothing is left under way then."""
