"""A server as a child process, played by one-line programs."""

from __future__ import annotations

import sys

import pytest

from jaxserve.server.process import ServerProcessError, running_process, running_server

SERVING = "import signal, sys; print('jaxserve: SERVING model=m on 127.0.0.1:7 after 0.1 s', flush=True); "


def test_the_address_is_given_and_the_server_stopped():
    clean_end = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); "
    with running_server(
        [sys.executable, "-c", clean_end.join(["import signal, sys; ", SERVING]) + "signal.pause()"]
    ) as address:
        assert address == "127.0.0.1:7"


def test_the_url_of_the_http_door_is_told_too():
    clean_end = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); "
    page = 'print("jaxserve: OpenAI\'s API at http://127.0.0.1:8/v1, a page at http://127.0.0.1:8/"); '
    program = f"import signal, sys; {clean_end}{page}{SERVING}signal.pause()"
    with running_process([sys.executable, "-c", program]) as server:
        assert (server.address, server.url) == ("127.0.0.1:7", "http://127.0.0.1:8")
        assert server.pid > 1


def test_a_server_that_never_serves():
    with (
        pytest.raises(ServerProcessError, match="the server ended with exit code 3 before it served"),
        running_server([sys.executable, "-c", "raise SystemExit(3)"]),
    ):
        pass


def test_a_server_that_does_not_end_cleanly():
    with (
        pytest.raises(ServerProcessError, match="the server ended with exit code -15 after SIGTERM"),
        running_server([sys.executable, "-c", SERVING + "signal.pause()"]),
    ):
        pass


def test_a_server_that_hangs_is_killed():
    with (
        pytest.raises(ServerProcessError, match="exit code -9 before it served"),
        running_server([sys.executable, "-c", "import time; time.sleep(60)"], timeout_seconds=0.3),
    ):
        pass
