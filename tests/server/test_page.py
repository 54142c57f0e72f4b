"""The page of the HTTP door, and the steps that it shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from http import HTTPStatus
from importlib import resources
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from jaxserve.engine.recent import KEPT_STEPS, Load, Recent
from jaxserve.errors import RequestError
from jaxserve.server.http import page
from jaxserve.server.http.page import PAGE
from jaxserve.tokenizer import Tokenizer
from tests.server.conftest import RunningServer
from tests.server.test_http import error_of, send

FILES = {name: resources.files(page).joinpath(name).read_text() for name, _ in PAGE.values()}


@pytest.fixture
def server(make_server: Callable[..., RunningServer]) -> RunningServer:
    return make_server(http_port=0)


def test_the_page_is_there_before_the_engine_is(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(http_port=0, ready=False)
    for path, (name, media_type) in PAGE.items():
        status, headers, text = send(server, "GET", path)
        assert (status, headers["content-type"]) == (HTTPStatus.OK, f"{media_type}; charset=utf-8")
        assert text.decode() == FILES[name]
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert set(re.findall(r"[\w-]+-src ([^;]+)", policy)) == {"'none'", "'self'", "data:"}
        assert headers["x-content-type-options"] == "nosniff"
    assert error_of(send(server, "GET", "/debug/steps"), 503) == "the server is warming up"
    assert send(server, "GET", "/page/../keys.py")[0] == HTTPStatus.NOT_FOUND
    assert send(server, "POST", "/")[0] == HTTPStatus.METHOD_NOT_ALLOWED


def test_the_page_needs_no_key_and_the_steps_do(make_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret\n")
    server = make_server(http_port=0, api_key_file=str(tmp_path / "keys"))
    for path in PAGE:
        status, _, text = send(server, "GET", path)
        assert status == HTTPStatus.OK
        assert b"secret" not in text
    assert send(server, "GET", "/debug/steps")[0] == HTTPStatus.UNAUTHORIZED
    assert send(server, "GET", "/debug/steps", headers={"Authorization": "Bearer secret"})[0] == HTTPStatus.OK
    assert send(server, "GET", "/page/")[0] == HTTPStatus.UNAUTHORIZED


def test_the_page_is_whole_and_knows_no_other_host() -> None:
    """The policy makes browsers refuse both, too; a page must not need it."""
    ids: list[str] = []
    linked: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            given = dict(attributes)
            assert not {name for name in given if name.startswith("on") or name == "style"}, "the policy forbids it"
            ids.extend(value for name, value in attributes if name == "id" and value)
            linked.extend(given[name] or "" for name in ("src", "href") if name in given)

    Parser().feed(FILES["index.html"])
    assert len(ids) == len(set(ids))
    assert {f"/{path}" for path in linked if path != "data:,"} < set(PAGE)
    scripts = "".join(text for name, text in FILES.items() if name.endswith(".js"))
    assert set(re.findall(r'element\("([\w-]+)"\)', scripts)) <= set(ids)
    for name, text in FILES.items():
        assert not re.search(r"\b(https?|wss?|ftp):|[\"'(=]\s*//", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", text), name


def test_the_page_knows_how_a_missing_template_is_told() -> None:
    with pytest.raises(RequestError) as caught:
        Tokenizer(Backend(BPE()), special_tokens={}, chat_template=None).apply_chat_template([])
    found = re.search(r'NO_TEMPLATE = "(.+)"', FILES["chat.js"])
    assert found is not None
    assert found[1] in str(caught.value)


def test_steps_since(server: RunningServer) -> None:
    recent = server.engine.metrics.recent
    empty = send(server, "GET", "/debug/steps")[2]
    nothing = {"p50": None, "p99": None, "num_samples": 0}
    assert empty == {
        "num_engines": 1, "token_budget": 64, "num_kv_blocks": 100, "last_step": 0, "num_running": 0,
        "num_waiting": 0, "num_used_blocks": 0, "cached_share": None, "acceptance": None,
        "ttft_seconds": nothing, "tbt_seconds": nothing, "steps": [],
    }  # fmt: skip
    recent.load = Load(3, 2, 40)
    recent.add_step(2, 60, 2, 0.5)
    recent.load = Load(2, 0, 30)
    recent.add_step(2, 0, 14, 0.25)
    recent.add_prompt(30, 0), recent.add_prompt(50, 40)
    recent.add_drafts(3, 1), recent.add_drafts(5, 1)
    recent.add_request(1.0, [0.1, 0.3])
    answer = send(server, "GET", "/debug/steps?since=1")[2]
    assert answer["steps"] == [
        {
            "number": 2, "num_decode_tokens": 2, "num_prefill_tokens": 0, "num_padding_tokens": 14, "seconds": 0.25,
            "num_running": 2, "num_waiting": 0, "num_used_blocks": 30,
        }
    ]  # fmt: skip
    assert [answer[name] for name in ("last_step", "num_running", "num_used_blocks")] == [2, 2, 30]
    assert (answer["cached_share"], answer["acceptance"]) == (0.5, 0.25)
    assert answer["ttft_seconds"] == {"p50": 1.0, "p99": 1.0, "num_samples": 1}
    assert answer["tbt_seconds"] == {"p50": pytest.approx(0.2), "p99": pytest.approx(0.298), "num_samples": 2}
    numbers = [[step["number"] for step in send(server, "GET", f"/debug/steps?since={n}")[2]["steps"]] for n in (0, 2)]
    assert numbers == [[1, 2], []]


def test_steps_of_one_engine(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(http_port=0, num_engines=2)
    server.engines[1].metrics.recent.add_step(1, 0, 15, 0.1)
    assert [send(server, "GET", f"/debug/steps?engine={n}")[2]["last_step"] for n in (0, 1)] == [0, 1]
    assert send(server, "GET", "/debug/steps")[2]["num_engines"] == 2
    for query, message in (
        ("engine=2", "engine must be an integer in [0, 1], got '2'"),
        ("engine=-1", "engine must be an integer in [0, 1], got '-1'"),
        ("since=x", "since must be an integer in [0, 9007199254740992], got 'x'"),
        ("since=%C2%B2", "since must be an integer in [0, 9007199254740992], got '²'"),
        (f"since={'9' * 5000}", "since must be an integer in [0, 9007199254740992], got '9999"),
    ):
        assert error_of(send(server, "GET", f"/debug/steps?{query}"), 400).startswith(message)


def test_only_the_last_steps_are_kept() -> None:
    recent = Recent(token_budget=64, num_blocks=100)
    for _ in range(KEPT_STEPS + 10):
        recent.add_step(1, 0, 15, 0.1)
    kept = recent.steps_after(0)
    assert (len(kept), kept[0].number, kept[-1].number) == (KEPT_STEPS, 11, KEPT_STEPS + 10)
    assert [step.number for step in recent.steps_after(KEPT_STEPS + 8)] == [KEPT_STEPS + 9, KEPT_STEPS + 10]
