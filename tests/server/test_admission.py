"""Admission without a protocol around it."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from jaxserve.request import FinishReason
from jaxserve.sampling_params import SamplingParams
from jaxserve.served_model import UnknownModelError
from jaxserve.server.admission import Admission
from jaxserve.server.caller import ANYBODY, Caller, current_caller
from jaxserve.server.config import ServerConfig
from jaxserve.server.errors import OverloadedError, UnavailableError


def test_who_is_admitted(engine):
    async def scenario() -> None:
        admission = Admission(ServerConfig(max_waiting=2, drain_seconds=0))
        with pytest.raises(UnavailableError, match="the server is warming up"), admission.request():
            pass
        admission.open([engine])
        with pytest.raises(UnknownModelError, match="model must be 'fake', which is served here, got 'other'"):
            admission.replicas("other")
        with contextlib.ExitStack() as stack:
            for model in ("", "fake"):
                stack.enter_context(admission.request(model))
            message = "max_waiting requests are in flight, the limit is 2"
            with pytest.raises(OverloadedError, match=message), admission.request():
                pass
            assert admission.num_active == 2
        with pytest.raises(ZeroDivisionError), admission.request():
            raise ZeroDivisionError
        assert admission.num_active == 0
        await admission.drain()
        with pytest.raises(UnavailableError, match="the server is draining"), admission.request():
            pass
        assert engine.closed

    asyncio.run(scenario())


def test_each_caller_has_a_limit_of_its_own(engine):
    first, second = Caller.of(b"first"), Caller.of(b"second")

    async def scenario() -> None:
        admission = Admission(ServerConfig(max_waiting=7, max_waiting_per_key=2))
        admission.open([engine])

        def admit(caller: Caller, num_sequences: int = 1) -> contextlib.AbstractContextManager[object]:
            current_caller.set(caller)
            return admission.request(num_sequences=num_sequences)

        message = "max_waiting_per_key requests of this API key are in flight, the limit is 2"
        with pytest.raises(OverloadedError, match=message), admit(first, 3):
            pass
        for _ in range(2):
            with contextlib.ExitStack() as stack:
                stack.enter_context(admit(first))
                stack.enter_context(admit(first, 0))
                stack.enter_context(admit(first))
                with pytest.raises(OverloadedError, match=message), admit(first):
                    pass
                stack.enter_context(admit(second, 2))
                stack.enter_context(admit(ANYBODY, 3))  # without keys there is no limit but max_waiting
                with pytest.raises(OverloadedError, match="max_waiting requests are in flight"), admit(ANYBODY):
                    pass
            assert admission.num_active == 0
        await admission.drain()

    asyncio.run(scenario())


def test_names_of_callers_tell_nothing_of_their_keys():
    assert Caller.of(b"secret").name == "2bb80d53"  # sha256sum
    assert Caller.of(b"secret") != Caller.of(b"secrets")


@pytest.mark.parametrize(("drain_seconds", "ending"), [(20, FinishReason.LENGTH), (0, FinishReason.ABORT)])
def test_draining_waits_for_the_running_ones_but_not_for_ever(engine, drain_seconds, ending):
    async def scenario() -> None:
        admission = Admission(ServerConfig(drain_seconds=drain_seconds))
        admission.open([engine])
        started = asyncio.Event()

        async def call() -> FinishReason | None:
            with admission.request() as replicas:
                async for delta in replicas.generate("a", [2], SamplingParams(max_tokens=30)):
                    started.set()
                    reason = delta.finish_reason
            return reason

        running = asyncio.create_task(call())
        await started.wait()
        await admission.drain()
        assert engine.closed
        assert await running is ending

    asyncio.run(scenario())
