"""Jax's profiler by HTTP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxserve.errors import ConfigError
from jaxserve.server.config import ServerConfig
from jaxserve.server.http.profile import Profiler
from tests.server.conftest import RunningServer
from tests.server.test_http import error_of, send


def test_a_profile_is_taken_between_start_and_stop(make_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    server = make_server(http_port=0, profiler_dir=str(tmp_path / "profiles"))
    none = "no profile is being taken: POST /start_profile begins one"
    assert error_of(send(server, "POST", "/stop_profile"), 400) == none
    for _ in range(2):
        assert send(server, "POST", "/start_profile")[0] == 200
        already = "a profile is being taken already: POST /stop_profile ends it"
        assert error_of(send(server, "POST", "/start_profile"), 400) == already
        jnp.ones(8).sum().block_until_ready()
        status, _, answer = send(server, "POST", "/stop_profile")
        assert status == 200
        (profile,) = (Path(file) for file in answer["files"] if file.endswith(".xplane.pb"))
        assert profile.is_relative_to(tmp_path / "profiles")
        assert profile.stat().st_size > 0
    assert error_of(send(server, "POST", "/stop_profile"), 400) == none


@pytest.mark.parametrize("path", ["/start_profile", "/stop_profile"])
def test_without_a_folder_the_flag_is_named(make_server: Callable[..., RunningServer], path: str) -> None:
    message = error_of(send(make_server(http_port=0), "POST", path), 404)
    assert message == "profiling needs the flag --profiler-dir FOLDER, which the server was started without"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"profiler_dir: cannot make the folder '.*/file/x': Not a directory"):
        Profiler(str(tmp_path / "file" / "x"))


def test_profiles_need_the_http_port() -> None:
    with pytest.raises(ConfigError, match="profiler_dir needs http_port or uds, got 'there' without"):
        ServerConfig(profiler_dir="there")
