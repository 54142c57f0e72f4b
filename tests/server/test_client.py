"""The client package and scripts/generate.py, against the fake engine."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import RequestError
from jaxserve.server.client import AsyncClient, Client, _generate_request, _is_local
from jaxserve.server.messages import structured_outputs
from jaxserve.server.proto.jaxserve.v1 import inference_pb2 as pb
from jaxserve.structured_outputs import StructuredOutputsParams

GENERATE = Path(__file__).parents[2] / "scripts" / "generate.py"


def generate(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(GENERATE), *args], capture_output=True, text=True, timeout=60)


def test_the_client_loads_no_jax():
    code = "import sys, jaxserve.server.client; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_generate_script_streams_text_and_reports_times(server):
    done = generate("hello", "--max-tokens", "5", "--target", server.target)
    assert (done.returncode, done.stdout) == (0, "xxxxx\n")
    assert "TTFT" in done.stderr
    assert "TBT p50" in done.stderr


def test_generate_script_tells_what_is_wrong(server):
    done = generate("hello", "--max-tokens", "0", "--target", server.target)
    assert done.returncode == 1
    assert "INVALID_ARGUMENT: max_tokens must be an integer in [1, 2147483647], got 0" in done.stderr


def test_generate_script_without_a_server():
    done = generate("hello", "--target", "127.0.0.1:1")
    assert done.returncode == 1
    assert "UNAVAILABLE at 127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


# ---- an unreachable server, and proxies


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_the_loopback_is_reached_behind_a_proxy(server, monkeypatch, variable):
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")

    async def generate() -> int:
        async with AsyncClient(server.target) as client:
            return len([response async for response in client.generate("abc", max_tokens=3)])

    with Client(server.target) as client:
        assert client.ready()
    with Client(server.target.replace("127.0.0.1", "localhost")) as client:
        assert client.ready()
    assert asyncio.run(generate()) == 3


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("127.0.0.1:50051", True),
        ("127.1.2.3", True),
        ("localhost:1", True),
        ("0.0.0.0:1", True),
        ("[::1]:1", True),
        ("[::]:1", True),
        ("dns:///localhost:1", True),
        ("ipv4:127.0.0.1:1", True),
        ("ipv6:[::1]:1", True),
        ("unix:/tmp/socket", True),
        ("10.0.0.1:50051", False),
        ("[2001:db8::1]:1", False),
        ("example.org:1", False),
        ("localhost.example.org:1", False),
        ("dns://127.0.0.1/example.org:1", False),
    ],
)
def test_which_targets_are_this_machine(target, local):
    assert _is_local(target) is local


def test_waiting_tells_what_is_in_the_way(make_server):
    with Client("127.0.0.1:1") as client:
        assert not client.ready()
        with pytest.raises(
            TimeoutError, match=r"^no server is ready at 127\.0\.0\.1:1 after 0 s: UNAVAILABLE: .*refused"
        ):
            client.wait_ready(timeout_seconds=0)
    with (
        Client(make_server(ready=False).target) as client,
        pytest.raises(TimeoutError, match="it warms up or drains"),
    ):
        client.wait_ready(timeout_seconds=0)


# ---- all of a prompt is sent, or nothing


IDS = [504, 3575, 282]


@pytest.mark.parametrize(
    "prompt",
    [
        tuple(IDS),
        (i for i in IDS),
        iter(IDS),
        np.array(IDS),
        np.array(IDS, np.uint16),
        [504, np.int64(3575), np.int8(0)],
    ],
)
def test_token_ids_of_any_kind_are_sent(prompt):
    sent = list(_generate_request(prompt, "", "", {}).token_ids.ids)
    assert sent in (IDS, [504, 3575, 0])


def test_messages_of_any_iterable_are_sent():
    messages = [{"role": "user", "content": "a"}, {"content": "", "role": "assistant"}]
    assert len(_generate_request(iter(messages), "", "", {}).chat.messages) == 2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([504, "capital", 282], r"prompt\[1\] must be an integer in \[0, 4294967295\], got 'capital'"),
        ([504, None], r"prompt\[1\] .* got None"),
        ([True], r"prompt\[0\] .* got True"),
        ([np.True_], r"prompt\[0\] .* got "),
        ([5.0], r"prompt\[0\] .* got 5\.0"),
        (np.array([5.0]), r"prompt\[0\] .* got "),
        (np.array([[5, 6]]), r"prompt\[0\] .* got array"),
        (np.array(5), "prompt must be a list, got array"),
        ([-1], r"prompt\[0\] .* got -1"),
        ([2**32], r"prompt\[0\] .* got 4294967296"),
        (b"text", "prompt must be a list, got b'text'"),
        ({5, 6}, "prompt must be a list, got {"),
        ({"prompt": "text"}, "prompt must be a list, got {'prompt'"),
        (None, "prompt must be a list, got None"),
        (7, "prompt must be a list, got 7"),
        ("\ud800", "prompt must be a string of valid Unicode"),
        ([{"role": "user", "content": "a"}, "b"], r"prompt\[1\] must be a message of role and content, got 'b'"),
        ([7, {"role": "user", "content": "a"}], r"prompt\[0\] must be a message"),
        ([{"role": "user"}], r"prompt\[0\] must be a message of role and content"),
        ([{"role": "user", "content": "a", "name": "b"}], r"prompt\[0\] must be a message of role and content"),
        ([{"role": "user", "content": None}], r"prompt\[0\]\['content'\] must be a string"),
    ],
)
def test_what_cannot_be_sent_is_refused(prompt, message):
    with pytest.raises(RequestError, match=message):
        _generate_request(prompt, "", "", {})


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temprature": 0.5}, "temprature is no sampling parameter; those are temperature, top_p"),
        ({"temperature": True}, "temperature must be a number, got True"),
        ({"temperature": "0.5"}, "temperature must be a number, got '0.5'"),
        ({"top_k": True}, "top_k must be an integer in .* got True"),
        ({"top_k": 2**31}, "top_k must be an integer in .* got 2147483648"),
        ({"max_tokens": 16.0}, r"max_tokens must be an integer in .* got 16\.0"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"),
        ({"stop": [b"a"]}, r"stop\[0\] must be a string"),
        ({"stop": 7}, "stop must be a list, got 7"),
        ({"stop_token_ids": [1, None]}, r"stop_token_ids\[1\] must be an integer"),
        ({"stop_token_ids": 7}, "stop_token_ids must be a list, got 7"),
        ({"bad_words": "a"}, "bad_words must be a list, got 'a'"),
        ({"bad_words": [1]}, r"bad_words\[0\] must be a string of valid Unicode, got 1"),
        ({"logit_bias": [1]}, r"logit_bias must be a mapping, got \[1\]"),
        ({"logit_bias": {"1": 1}}, "logit_bias: token id must be an integer in .* got '1'"),
        ({"logit_bias": {1: "a"}}, "logit_bias must be a number, got 'a'"),
        ({"cache_salt": 7}, "cache_salt must be a string of valid Unicode, got 7"),
    ],
)
def test_sampling_parameters_that_cannot_be_sent_are_refused(sampling, message):
    with pytest.raises(RequestError, match=message):
        _generate_request("abc", "", "", sampling)


def test_sampling_parameters_are_sent_as_given():
    given = {"temperature": np.float32(0.5), "top_k": np.int64(3), "seed": None, "max_tokens": None, "ignore_eos": True}
    lists = {"stop": "a", "stop_token_ids": np.array([1, 2]), "bad_words": None}
    edits = {
        "logit_bias": {np.int32(3): np.float32(0.5)},
        "allowed_token_ids": range(2),
        "cache_salt": "s",
        "priority": -1,
    }
    sent = {"temperature": 0.5, "top_k": 3, "max_tokens": -1, "ignore_eos": True, "cache_salt": "s", "priority": -1}
    assert _generate_request("abc", "", "", given | lists | edits).sampling_params == pb.SamplingParams(
        **sent, stop=["a"], stop_token_ids=[1, 2], logit_bias={3: 0.5}, allowed_token_ids=[0, 1]
    )


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"json": {"type": "null"}}, {"json": '{"type": "null"}'}),
        ({"choice": ("a", "b")}, {"choice": ["a", "b"]}),
        (StructuredOutputsParams(json_object=True), {"json_object": True}),
    ],
)
def test_structured_outputs_are_sent(asked, expected):
    message = _generate_request("abc", "", "", {"structured_outputs": asked}).sampling_params
    assert structured_outputs(message.structured_outputs) == expected
    assert not _generate_request("abc", "", "", {"structured_outputs": None}).sampling_params.ListFields()


@given(st.lists(st.integers() | st.booleans() | st.floats() | st.none() | st.text(max_size=3)))
def test_nothing_is_ever_dropped(prompt):
    try:
        sent = list(_generate_request(prompt, "", "", {}).token_ids.ids)
    except RequestError:
        assert any(type(item) is not int or not 0 <= item < 2**32 for item in prompt)
    else:
        assert sent == prompt


def test_other_calls_refuse_too(client):
    with pytest.raises(RequestError, match="prompt must be a text or a chat to be tokenized"):
        client.tokenize([1, 2])
    with pytest.raises(RequestError, match=r"token_ids\[1\] must be an integer"):
        client.detokenize([97, -1])
    with pytest.raises(RequestError, match="request_id must be a string"):
        client.generate("abc", request_id=7)
