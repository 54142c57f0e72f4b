"""Offline batches in OpenAI's batch format: one request a line in, one result a line out, resumable.

In: ``{"custom_id", "method": "POST", "url", "body"}``. Out, in the order in which requests finish:
``{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}``. A line that cannot be served gets a
result with an error and hurts no other line. To run such lines again, delete their results from the output.
"""

from jaxserve.batch.config import OfflineConfig
from jaxserve.batch.endpoint import EndpointServer
from jaxserve.batch.engine import FIRST, EngineServer
from jaxserve.batch.lines import BatchInput, Shard
from jaxserve.batch.results import BatchFileError, ResultFile
from jaxserve.batch.run import BatchRun, BatchSummary

__all__ = [
    "FIRST",
    "BatchFileError",
    "BatchInput",
    "BatchRun",
    "BatchSummary",
    "EndpointServer",
    "EngineServer",
    "OfflineConfig",
    "ResultFile",
    "Shard",
]
