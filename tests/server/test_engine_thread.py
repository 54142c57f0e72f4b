"""The engine thread without gRPC around it."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from jaxserve.errors import RequestError
from jaxserve.request import FinishReason
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.engine_thread import JOINED_TOKENS, MAX_WAITING_DELTAS, EngineDeadError, EngineThread

ENDLESS = SamplingParams(max_tokens=None)


@contextlib.asynccontextmanager
async def running(engine):
    thread = EngineThread(engine, on_death=lambda: None)
    try:
        yield thread
    finally:
        await thread.stop()
        assert not engine.has_unfinished()


def test_a_name_can_be_used_again_right_after_a_cancel(engine):
    """The engine reports an abort a step late; that report must not end the next request of the same name."""

    async def scenario() -> None:
        async with running(engine) as thread:
            for _ in range(20):
                stream = thread.generate("same", [2, 3], ENDLESS)
                assert (await anext(stream)).finish_reason is None
                await stream.aclose()
                assert thread.num_in_flight == 0

    asyncio.run(scenario())


def test_cancelled_before_its_first_delta(engine):
    async def scenario() -> None:
        async with running(engine) as thread:
            waiting = asyncio.ensure_future(anext(thread.generate("a", [2], ENDLESS)))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert thread.num_in_flight == 0

    asyncio.run(scenario())


def test_what_a_slow_reader_is_behind_with_is_joined(engine):
    """Nothing is lost, little waits, and the engine waits for nobody."""

    async def scenario() -> None:
        async with running(engine) as thread:
            params = SamplingParams(max_tokens=300, logprobs=0, prompt_logprobs=0)
            stream = thread.generate("slow", [2, 3], params)
            first = await anext(stream)
            while engine.has_unfinished():
                await asyncio.sleep(0.05)
            rest = [delta async for delta in stream]
            assert MAX_WAITING_DELTAS <= len(rest) <= MAX_WAITING_DELTAS + 300 / JOINED_TOKENS + 1
            assert max(len(delta.token_ids) for delta in rest) <= JOINED_TOKENS
            assert "".join(delta.text for delta in (first, *rest)) == "x" * 300
            assert sum(len(delta.logprobs) for delta in (first, *rest)) == 300
            assert [delta.finish_reason for delta in rest] == [None] * (len(rest) - 1) + [FinishReason.LENGTH]

    asyncio.run(scenario())


def test_stop_aborts_what_is_left_and_refuses_more(engine):
    async def scenario() -> None:
        async with running(engine) as thread:
            stream = thread.generate("a", [2], ENDLESS)
            await anext(stream)
            await thread.stop()
            assert [delta async for delta in stream][-1].finish_reason is FinishReason.ABORT
            with pytest.raises(EngineDeadError):
                await anext(thread.generate("b", [2], ENDLESS))

    asyncio.run(scenario())


def test_death_is_reported_to_every_request_once(engine):
    async def scenario() -> None:
        deaths = []
        thread = EngineThread(engine, lambda: deaths.append(True))
        streams = [thread.generate(str(i), [2], ENDLESS) for i in range(3)]
        for stream in streams:
            await anext(stream)
        engine.step_error = RuntimeError("a device error")
        for stream in streams:
            with pytest.raises(EngineDeadError):
                async for _ in stream:
                    pass
        assert not await thread.abort("0")
        assert deaths == [True]
        await thread.stop()

    asyncio.run(scenario())


def test_a_bad_request_fails_alone_and_leaves_no_trace(engine):
    async def scenario() -> None:
        async with running(engine) as thread:
            good = thread.generate("good", [2], ENDLESS)
            await anext(good)
            with pytest.raises(RequestError, match="prompt"):
                await anext(thread.generate("bad", [], ENDLESS))
            with pytest.raises(RequestError, match="request_id"):
                await anext(thread.generate("good", [2], ENDLESS))
            await anext(good)
            assert thread.num_in_flight == 1
            await good.aclose()

    asyncio.run(scenario())


def test_the_engine_is_touched_by_one_thread_only(engine):
    async def scenario() -> None:
        threads = set()
        for name in ("add_request", "abort", "step"):
            method = getattr(engine, name)

            def recording(*args, method=method):
                threads.add(threading.current_thread().name)
                return method(*args)

            setattr(engine, name, recording)
        async with running(engine) as thread:
            stream = thread.generate("a", [2], ENDLESS)
            await anext(stream)
            assert await thread.abort("a")
        assert threads == {"engine"}

    asyncio.run(scenario())


def test_a_step_that_hangs_is_the_death_of_the_engine(engine):
    async def scenario() -> None:
        deaths, release = [], threading.Event()
        thread = EngineThread(engine, on_death=lambda: deaths.append(True), step_timeout_seconds=0.5)
        step = engine.step

        def hanging():
            if engine.num_steps == 3:
                release.wait()
            return step()

        engine.step = hanging
        with pytest.raises(EngineDeadError):
            async for _ in thread.generate("a", [2], ENDLESS):
                pass
        assert deaths == [True]
        with pytest.raises(EngineDeadError):
            await anext(thread.generate("b", [2], ENDLESS))
        release.set()
        await thread.stop()

    asyncio.run(scenario())
