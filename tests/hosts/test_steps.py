"""The stream of steps from a group's leader to its followers, with runners that only take notes."""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from jaxserve.config import EngineConfig, ResolvedConfig
from jaxserve.engine.runner import Kind
from jaxserve.errors import ConfigError
from jaxserve.hosts.steps import Follower, Followers
from jaxserve.hosts.trust import BLIND, Trust

CONFIG = EngineConfig(max_num_seqs=4, token_budget=16).resolve(model_max_len=64, on_gpu=False)
NUM_STAGES = 2
TIMEOUT_SECONDS = 20


class FakeRunner:
    def __init__(self, config: ResolvedConfig = CONFIG) -> None:
        self.config = config
        self.num_blocks, self.num_stages = 10, NUM_STAGES
        self.calls: list[tuple[Any, ...]] = []

    def prepare_rare(self) -> None:
        """Has no programs."""

    def run(self, kind: Kind, size: int, array: np.ndarray) -> None:
        self.calls.append((kind, size, array))


class Leading:
    """The leader's side."""

    def __init__(self, num_followers: int, trust: Trust = BLIND) -> None:
        self.lost: list[str] = []
        self.one_lost, self.drain = threading.Event(), threading.Event()
        self.followers = Followers(num_followers, "127.0.0.1:0", self._on_lost, self.drain.set, trust)
        self.address = f"127.0.0.1:{self.followers.port}"

    def _on_lost(self, message: str) -> None:
        self.lost.append(message)
        self.one_lost.set()


class Following(threading.Thread):
    """A follower, whose ``run`` is on."""

    def __init__(self, leading: Leading, rank: int, config: ResolvedConfig = CONFIG, trust: Trust = BLIND) -> None:
        super().__init__(daemon=True)
        self.runner = FakeRunner(config)
        self.lost = threading.Event()
        self.message = ""
        self.follower = Follower(self.runner, rank, leading.address, self._on_lost, trust)
        self.error: Exception | None = None
        self.start()

    def _on_lost(self, message: str) -> None:
        self.message = message
        self.lost.set()

    def run(self) -> None:
        try:
            self.follower.run()
        except ConfigError as error:
            self.error = error


@pytest.fixture
def leading() -> Iterator[Leading]:
    with ExitStack() as stack:
        leading = Leading(2)
        stack.callback(leading.followers.stop)
        yield leading


def test_followers_run_what_the_leader_sends_and_stop_with_it(leading: Leading) -> None:
    threads = [Following(leading, rank) for rank in (1, 2)]
    runner = FakeRunner()
    leading.followers.wait(runner)
    targets = np.arange(16, dtype=np.int32)
    sent = [
        (Kind.ADMIT, 0, targets + 5),
        (Kind.FORWARD, 16, np.arange(200, dtype=np.int32).reshape(NUM_STAGES, 100)),
        (Kind.SAMPLE, 4, targets[:0]),
        (Kind.SCORE, 16, targets),
        (Kind.SAMPLE_EDITED, 4, targets),
    ]
    for kind, size, array in sent:
        leading.followers.send(kind, size, array if array.size else None)
    leading.followers.stop()
    for thread in threads:
        thread.join(TIMEOUT_SECONDS)
        assert [call[:2] for call in thread.runner.calls] == [call[:2] for call in sent]
        for (*_, got), (*_, wanted) in zip(thread.runner.calls, sent, strict=True):
            np.testing.assert_array_equal(got, wanted)
        assert not thread.lost.is_set()
    assert not leading.lost


def test_each_side_learns_when_the_other_goes_away(leading: Leading) -> None:
    first, second = (Following(leading, rank) for rank in (1, 2))
    leading.followers.wait(FakeRunner())
    first.follower._channel.close()
    assert leading.one_lost.wait(TIMEOUT_SECONDS)
    assert leading.lost == ["host 1 of the group is gone"]
    leading.followers._server.stop(grace=None)
    assert second.lost.wait(TIMEOUT_SECONDS)


def test_a_follower_can_ask_for_the_end(leading: Leading) -> None:
    threads = [Following(leading, rank) for rank in (1, 2)]
    leading.followers.wait(FakeRunner())
    threads[0].follower.drain()
    assert leading.drain.wait(TIMEOUT_SECONDS)


def test_hosts_with_other_settings_are_told_which(leading: Leading) -> None:
    other = Following(leading, 1, dataclasses.replace(CONFIG, max_num_seqs=8))
    message = "max_num_seqs must be the same on all hosts: the leader has 4, host 1 8"
    with pytest.raises(ConfigError, match=message):
        leading.followers.wait(FakeRunner())
    other.join(TIMEOUT_SECONDS)
    assert str(other.error) == message


def test_a_port_in_use_is_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"coordinator_port: cannot listen on {address}, the port above it"):
            Followers(1, address, print, print, BLIND)
