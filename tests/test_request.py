"""SamplingParams name the field, the value and the limit; a request's counts and outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.errors import RequestError
from jaxserve.request import (
    Completion,
    FinishReason,
    Logprob,
    PositionLogprobs,
    Request,
    RequestDelta,
    RequestMetrics,
    request_output,
)
from jaxserve.sampling_params import MAX_SEED, MAX_STOP_STRINGS, SamplingParams

INT_LIMIT = 2**31 - 1
NOT_NUMBERS = [True, np.True_, np.float64("nan"), np.array([1]), math.nan, math.inf, -math.inf, "1", None, [1], 10**400]


def error(**fields: Any) -> str:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**fields)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "values", "limits"),
    [
        ("temperature", [-0.1, 100.5], "in [0, 100]"),
        ("top_p", [0, 0.0, -0.1, 1.01], "in (0, 1]"),
        ("min_p", [-0.1, 1.01], "in [0, 1]"),
        ("presence_penalty", [-2.1, 2.1], "in [-2, 2]"),
        ("frequency_penalty", [-2.1, 2.1], "in [-2, 2]"),
        ("repetition_penalty", [-1, 0, 100.5], "in (0, 100]"),
    ],
)
def test_numbers(name: str, values: list[float], limits: str) -> None:
    for value in [*values, *NOT_NUMBERS]:
        assert error(**{name: value}) == f"{name} must be {limits}, got {value!r}"


@pytest.mark.parametrize(
    ("name", "values", "limits"),
    [
        ("top_k", [-2, INT_LIMIT + 1], f"[-1, {INT_LIMIT}]"),
        ("seed", [-1, MAX_SEED + 1], f"[0, {MAX_SEED}]"),
        ("max_tokens", [0, -1, INT_LIMIT + 1], f"[1, {INT_LIMIT}]"),
        ("logprobs", [-2, INT_LIMIT + 1], f"[-1, {INT_LIMIT}]"),
        ("prompt_logprobs", [-2, INT_LIMIT + 1], f"[-1, {INT_LIMIT}]"),
        ("min_tokens", [-1, INT_LIMIT + 1], f"[0, {INT_LIMIT}]"),
        ("logprob_start_len", [-1, INT_LIMIT + 1], f"[0, {INT_LIMIT}]"),
        ("n", [0, 129], "[1, 128]"),
        ("best_of", [0, 129], "[1, 128]"),
    ],
)
def test_integers(name: str, values: list[int], limits: str) -> None:
    optional = name not in ("top_k", "min_tokens", "logprob_start_len", "n")
    for value in [*values, 1.0, np.float64(1), *(value for value in NOT_NUMBERS if value is not None or not optional)]:
        assert error(**{name: value}) == f"{name} must be an integer in {limits}, got {value!r}"


def test_where_prompt_logprobs_start() -> None:
    assert error(logprob_start_len=3) == "logprob_start_len must be 0 without prompt_logprobs, got 3"
    assert SamplingParams(prompt_logprobs=0, logprob_start_len=3).logprob_start_len == 3


@pytest.mark.parametrize("stop", ["", ("a", ""), [1], [None], ["a"] * (MAX_STOP_STRINGS + 1)])
def test_stop_strings(stop: Any) -> None:
    message = error(stop=stop)
    assert message.startswith(f"stop must be at most {MAX_STOP_STRINGS} non-empty strings, got ")
    assert repr(stop).strip("[](),") in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": [(1, 2)]}, "logit_bias must be a mapping of at most 300 tokens, got [(1, 2)]"),
        ({"logit_bias": dict.fromkeys(range(301), 1)}, "logit_bias must be a mapping of at most 300 tokens, got {0: 1"),
        ({"logit_bias": {1: 100.5}}, "logit_bias must be in [-100, 100], got 100.5"),
        ({"logit_bias": {"x": 1}}, f"logit_bias: token id must be an integer in [0, {INT_LIMIT}], got 'x'"),
        ({"logit_bias": {-1: 1}}, f"logit_bias: token id must be an integer in [0, {INT_LIMIT}], got -1"),
        ({"allowed_token_ids": []}, "allowed_token_ids must hold at least one token id, got none"),
        ({"allowed_token_ids": [-1]}, f"allowed_token_ids must be an integer in [0, {INT_LIMIT}], got -1"),
        ({"bad_words": "a"}, "bad_words must be a list, got 'a'"),
        ({"bad_words": [" "]}, "bad_words must be at most 128 strings of 1 to 128 characters that are not blank, got"),
        ({"bad_words": ["a"] * 129}, "bad_words must be at most 128 strings of 1 to 128 characters that are not "),
        ({"bad_words": ["a" * 129]}, "bad_words must be at most 128 strings of 1 to 128 characters that are not "),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens must not exceed max_tokens, 8, got 9"),
    ],
)
def test_edits_of_logits(fields: dict[str, Any], message: str) -> None:
    assert error(**fields).startswith(message)


def test_which_parameters_edit_logits() -> None:
    neutral = {"presence_penalty": 0, "repetition_penalty": 1.0, "logit_bias": {}, "bad_words": [], "min_tokens": 0}
    assert not SamplingParams(**neutral, temperature=0.5, top_k=3).edits_logits
    for fields in ({"presence_penalty": 0.1}, {"logit_bias": {"7": 1}}, {"allowed_token_ids": [1]}, {"min_tokens": 1}):
        assert SamplingParams(**fields).edits_logits
    assert SamplingParams(logit_bias={"7": 1}) == SamplingParams(logit_bias={np.int64(7): 1.0})


@pytest.mark.parametrize("value", [-1, INT_LIMIT + 1, True, 1.0, "1", None])
def test_stop_token_ids(value: Any) -> None:
    expected = f"stop_token_ids must be an integer in [0, {INT_LIMIT}], got {value!r}"
    assert error(stop_token_ids=[3, value]) == expected


@pytest.mark.parametrize("make", [np.int64, np.uint8, np.array, jnp.int32])
def test_numbers_of_other_libraries_become_pythons(make: Callable[[int], Any]) -> None:
    names = ("temperature", "top_p", "min_p", "top_k", "seed", "max_tokens", "logprobs", "prompt_logprobs")
    params = SamplingParams(**{name: make(1) for name in names}, stop_token_ids=[make(1)], ignore_eos=make(1) == 1)
    assert params == SamplingParams(**dict.fromkeys(names, 1), stop_token_ids=[1], ignore_eos=True)
    assert {type(getattr(params, name)) for name in names} == {int}
    assert type(params.stop_token_ids[0]) is int  # type: ignore[index]
    assert params.ignore_eos is True
    assert type(SamplingParams(temperature=np.float32(0.5)).temperature) is float


def test_lists_may_be_any_iterable() -> None:
    wanted = SamplingParams(stop=["a", "b"], stop_token_ids=[1, 2])
    assert SamplingParams(stop=np.array(["a", "b"]), stop_token_ids=np.array([1, 2])) == wanted
    assert SamplingParams(stop=iter(["a", "b"]), stop_token_ids=range(1, 3)) == wanted


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", b"a"),
        ("stop_token_ids", "12"),
        ("stop", 5),
        ("stop", {"a": 1}),
        ("stop_token_ids", 5),
        ("stop_token_ids", {5: 1}),
    ],
)
def test_stops_are_lists(name: str, value: Any) -> None:
    assert error(**{name: value}) == f"{name} must be a list, got {value!r}"


@pytest.mark.parametrize(
    "name", ["ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"]
)
@pytest.mark.parametrize("value", ["no", 1, None])
def test_switches(name: str, value: Any) -> None:
    message = error(**{name: value})
    assert message.startswith(f"{name} must be ")
    assert message.endswith(f"got {value!r}")


@pytest.mark.parametrize("priority", [-101, 101, 0.5, "high", True])
def test_priorities_are_few(priority: Any) -> None:
    assert error(priority=priority) == f"priority must be an integer in [-100, 100], got {priority!r}"


@pytest.mark.parametrize("number", [-1, 0.5, "few", True])
def test_drafts_are_a_number(number: Any) -> None:
    message = f"num_speculative_tokens must be an integer in [0, {INT_LIMIT}], got {number!r}"
    assert error(num_speculative_tokens=number) == message


@pytest.mark.parametrize("salt", ["", "x" * 129, 5, b"a"])
def test_salts_are_short_strings(salt: Any) -> None:
    assert error(cache_salt=salt) == f"cache_salt must be a string of 1 to 128 characters, got {salt!r}"


def test_a_prompt_is_not_truncated_to_nothing() -> None:
    assert error(truncate_prompt_tokens=0) == "truncate_prompt_tokens must be -1 or at least 1, got 0"


def test_logprobs_of_a_position_are_a_mapping() -> None:
    """The chosen token is first, also where it is among the likeliest."""
    ids, top = np.array([7, 5], np.int32), np.array([-0.5, -1.0], np.float32)
    found = PositionLogprobs(5, Logprob(-1.0, 2), ids, top)
    assert found == {5: Logprob(-1.0, 2), 7: Logprob(-0.5, 1)} == dict(found.items())
    assert [*found] == [5, 7]
    assert (found[5], found[7], len(found), 9 in found) == (Logprob(-1.0, 2), Logprob(-0.5, 1), 2, False)
    assert [*found.values()] == [found[5], found[7]]
    assert repr(found) == repr(dict(found))
    assert list(PositionLogprobs(9, Logprob(-9.0, 30), ids, top)) == [9, 7, 5]


def test_limits_are_within_reach() -> None:
    SamplingParams(temperature=0, top_p=1, min_p=0, top_k=-1, seed=0, max_tokens=1, logprobs=0, prompt_logprobs=0)
    SamplingParams(
        temperature=100, top_p=1e-9, min_p=1.0, top_k=INT_LIMIT, seed=MAX_SEED, max_tokens=None, logprobs=20,
        prompt_logprobs=20, stop=["a"] * MAX_STOP_STRINGS, stop_token_ids=[0, INT_LIMIT], cache_salt="x" * 128,
        priority=-100, num_speculative_tokens=0,
    )  # fmt: skip


def test_stops_become_tuples() -> None:
    params = SamplingParams(stop="END", stop_token_ids=[1, 2])
    assert (params.stop, params.stop_token_ids) == (("END",), (1, 2))
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert hash(params) == hash(SamplingParams(stop=("END",), stop_token_ids=(1, 2)))


@pytest.mark.parametrize(
    ("given", "defaults", "expected"),
    [
        ({}, {}, SamplingParams()),
        ({}, {"temperature": 0.7, "top_k": 20}, SamplingParams(temperature=0.7, top_k=20)),
        (
            {"temperature": 0.0, "seed": 1},
            {"temperature": 0.7, "top_k": 20},
            SamplingParams(temperature=0, top_k=20, seed=1),
        ),
        ({}, {"max_tokens": 500}, SamplingParams(max_tokens=100)),
        ({}, {"max_tokens": 50}, SamplingParams(max_tokens=50)),
        ({}, {"max_tokens": None}, SamplingParams(max_tokens=None)),
        ({"max_tokens": 500}, {"max_tokens": 50}, SamplingParams(max_tokens=500)),
        ({}, {"max_tokens": 101}, SamplingParams(max_tokens=100)),
        ({"max_tokens": None}, {"max_tokens": 50}, SamplingParams(max_tokens=None)),
    ],
)
def test_defaults_fill_in_what_is_not_given(
    given: dict[str, Any], defaults: dict[str, Any], expected: SamplingParams
) -> None:
    assert SamplingParams.with_defaults(given, defaults, num_room_tokens=100) == expected


def test_a_default_of_max_tokens_stays_valid_without_room() -> None:
    for defaults in ({}, {"max_tokens": 50}):
        assert SamplingParams.with_defaults({}, defaults, num_room_tokens=-3).max_tokens == 1


def test_a_max_tokens_that_nobody_set_ends_with_the_window() -> None:
    soft = [SamplingParams(), SamplingParams.with_defaults({}, {"max_tokens": 50}, num_room_tokens=16)]
    assert [params.max_output_tokens(100) for params in soft] == [16, 16]
    assert [params.max_output_tokens(5) for params in [*soft, replace(soft[0], seed=1)]] == [5] * 3
    assert SamplingParams(max_tokens=16).max_output_tokens(5) == 16, "to be refused"
    assert SamplingParams(max_tokens=None).max_output_tokens(5) == 5


def test_defaults_do_not_hide_what_is_wrong() -> None:
    with pytest.raises(RequestError, match=r"top_p must be in \(0, 1\], got 2"):
        SamplingParams.with_defaults({"top_p": 2}, {"top_p": 0.5}, num_room_tokens=100)


def make_request(prompt: list[int], max_tokens: int = 3) -> Request:
    return Request("a", prompt, SamplingParams(), max_tokens, RequestMetrics(arrival_seconds=0.0))


def test_progress_of_a_request() -> None:
    request = make_request([5, 6, 7])
    assert (request.num_tokens, request.num_uncomputed_tokens, request.decoding) == (3, 3, False)
    request.num_computed_tokens = 2
    assert not request.decoding, "the last prompt token is prefill"
    request.num_computed_tokens, request.num_tokens = 3, 4
    assert (request.num_tokens, request.decoding, request.exhausted) == (4, True, False)
    assert request.known_token_ids(3, 4) == [], "the pending token is on the device only"
    request.num_tokens, request.output_token_ids = 5, [8, 9]
    assert request.num_uncomputed_tokens == 2
    request.num_tokens = 6
    assert request.num_pending_tokens == 1
    assert request.exhausted
    assert not request.decoding, "a recomputation has more than one token of work"


def test_known_tokens_are_those_of_the_sequence() -> None:
    request = make_request([5, 6, 7])
    request.output_token_ids = [8, 9]
    tokens = [5, 6, 7, 8, 9]
    for start in range(6):
        for stop in range(start, 7):
            assert request.known_token_ids(start, stop) == tokens[start:stop]


def test_times() -> None:
    metrics = RequestMetrics(arrival_seconds=10.0)
    assert (metrics.ttft_seconds, metrics.scheduling_delay_seconds, metrics.tbt_seconds) == (None, None, [])
    metrics.first_scheduled_seconds = 10.5
    metrics.token_seconds = [12.0, 12.25, 13.0]
    assert (metrics.ttft_seconds, metrics.scheduling_delay_seconds) == (2.0, 0.5)
    assert metrics.tbt_seconds == [0.25, 0.75]


def test_a_completion_is_the_sum_of_its_deltas() -> None:
    metrics = RequestMetrics(arrival_seconds=0.0)
    scored: list[dict[int, Logprob] | None] = [None, {6: Logprob(-2.0, 1)}]
    end = FinishReason.STOP
    deltas = [
        RequestDelta("a", [7], "", [{7: Logprob(-0.5, 1)}], scored, None, None, metrics, 2),
        RequestDelta("a", [8, 9], "xy", [{8: Logprob(-1.0, 2)}, {9: Logprob(-2.0, 1)}], None, None, None, metrics, 2),
        RequestDelta("a", [], "z", None, None, end, "stop", metrics, 2),
    ]
    completion = Completion("a", [5, 6], SamplingParams(logprobs=0, prompt_logprobs=0), prompt="shown")
    for delta in deltas:
        assert completion.finish_reason is None
        completion.add(delta)
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("xyz", [7, 8, 9], end)
    output = request_output("a", [completion], 1)
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("a", "shown", [5, 6])
    assert (output.prompt_logprobs, output.metrics, output.finished) == (scored, metrics, True)
    (only,) = output.outputs
    assert (only.text, only.token_ids, only.cumulative_logprob) == ("xyz", [7, 8, 9], -3.5)
    assert (only.finish_reason, only.stop_reason) == ("stop", "stop")


def test_a_completion_without_logprobs_has_none() -> None:
    completion = Completion("a", [5], SamplingParams())
    completion.add(
        RequestDelta("a", [7], "x", None, None, FinishReason.LENGTH, None, RequestMetrics(arrival_seconds=0.0), 1)
    )
    output = request_output("a", [completion], 1)
    (only,) = output.outputs
    assert (only.logprobs, only.cumulative_logprob, output.prompt_logprobs) == (None, None, None)


def test_choices_and_the_best_of_them() -> None:
    """So many requests with seeds of their own, and log-probabilities to rank them, which are not shown unasked."""
    assert error(n=3, best_of=2) == "best_of must be an integer in [3, 128], got 2"
    (one,) = Completion.choices("a", [5], SamplingParams(seed=3))
    assert (one.request_id, one.params) == ("a", SamplingParams(seed=3))
    params = SamplingParams(n=2, best_of=3, seed=MAX_SEED, max_tokens=4)
    completions = Completion.choices("a", [5], params, "shown")
    assert [c.request_id for c in completions] == ["a-0", "a-1", "a-2"]
    assert [c.params.seed for c in completions] == [MAX_SEED, 0, 1]
    assert {(c.params.num_choices, c.params.logprobs) for c in completions} == {(1, 0)}
    metrics = RequestMetrics(arrival_seconds=0.0)
    for completion, logprobs in zip(completions, ([-1.0], [-0.5, -1.1], [-0.9]), strict=True):
        for logprob in logprobs:
            entry = {7: Logprob(logprob, 1)}
            completion.add(RequestDelta("a", [7], "x", [entry], None, FinishReason.STOP, None, metrics, 1))
    output = request_output("a", completions, params.n)
    assert [(one.index, one.cumulative_logprob, one.logprobs) for one in output.outputs] == [
        (0, -1.6, None), (1, -0.9, None),
    ]  # fmt: skip
    assert (output.prompt, output.request_id) == ("shown", "a")
