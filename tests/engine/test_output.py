"""From tokens to text: nothing is emitted that a stop string takes back, and nothing is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxserve.engine.output import OutputStream, logprob_entry
from jaxserve.engine.sampler import TokenLogprobs
from jaxserve.models.loading import gguf_tokenizer
from jaxserve.models.loading.gguf_file import read_gguf
from jaxserve.models.loading.hub import resolve
from jaxserve.request import FinishReason, Logprob, Request, RequestMetrics
from jaxserve.sampling_params import SamplingParams
from tests.test_tokenizer import sentencepiece

TOKENIZER = gguf_tokenizer.load(read_gguf(resolve("smollm2-135m")).metadata)
EOS = 2
FAMILY = "👩‍👩‍👧‍👦"
"""Four people and three joiners: several tokens each."""


def make_stream(max_tokens: int = 10**6, **params: Any) -> OutputStream:
    sampling = SamplingParams(**params)
    request = Request(
        request_id="a",
        prompt_token_ids=[1],
        params=sampling,
        max_tokens=max_tokens,
        metrics=RequestMetrics(arrival_seconds=0.0),
        stop_token_ids=frozenset((*sampling.stop_token_ids, EOS)),
    )
    return OutputStream(request, TOKENIZER)


def push_all(stream: OutputStream, token_ids: list[int]) -> tuple[list[str], FinishReason | None]:
    """The deltas up to the one that ends the output, and why it ended."""
    deltas = []
    for token_id in token_ids:
        text, reason = stream.push(token_id)
        deltas.append(text)
        if reason is not None:
            return deltas, reason
    return deltas, None


def letters(text: str) -> list[int]:
    """One token for each character, so that stop strings spread over tokens."""
    token_ids = [token_id for character in text for token_id in TOKENIZER.encode(character)]
    assert len(token_ids) == len(text)
    return token_ids


def test_text_flows_without_stop_strings() -> None:
    deltas, reason = push_all(make_stream(), letters("hello world"))
    assert deltas == list("hello world")
    assert reason is None


@pytest.mark.parametrize(("stop", "text"), [((), " world"), (" world", ""), (" wor", ""), ("ld", " wor")])
def test_the_first_token_after_a_prompt_keeps_its_space(stop: str | tuple[str, ...], text: str) -> None:
    """Sentencepiece drops the space of a text's first word, which the output's is not."""
    tokenizer = sentencepiece()
    token_ids = tokenizer.encode("hello world")
    request = Request("a", token_ids[:2], SamplingParams(stop=stop), len(token_ids) - 2, RequestMetrics(0.0))
    stream = OutputStream(request, tokenizer)
    deltas, reason = push_all(stream, token_ids[2:])
    assert "".join(deltas) == text
    assert reason is (FinishReason.STOP if stop else FinishReason.LENGTH)


def test_stop_string_split_over_tokens() -> None:
    stream = make_stream(stop="END")
    deltas, reason = push_all(stream, letters("one EEND two"))
    # Each E may begin END; the first turns out not to.
    assert deltas == ["o", "n", "e", " ", "", "E", "", ""]
    assert (reason, stream.stop_reason) == (FinishReason.STOP, "END")
    assert len(stream.request.output_token_ids) == 8


def test_stop_string_inside_a_token() -> None:
    (token_id,) = TOKENIZER.encode(" important")
    stream = make_stream(stop="port")
    assert stream.push(token_id) == (" im", FinishReason.STOP)


def test_held_text_is_released_when_it_does_not_stop() -> None:
    deltas, _ = push_all(make_stream(stop=["abcd"]), letters("abcabce"))
    assert deltas == ["", "", "", "abc", "", "", "abce"]


def test_stop_string_that_overlaps_itself() -> None:
    stream = make_stream(stop="aab")
    deltas, reason = push_all(stream, letters("aaab"))
    assert deltas == ["", "", "a", ""]
    assert reason is FinishReason.STOP


def test_earliest_stop_string_wins() -> None:
    (token_id,) = TOKENIZER.encode(" important")
    for stop in (["rt", "po", "zzz"], ["po", "rt"]):
        stream = make_stream(stop=stop)
        assert stream.push(token_id) == (" im", FinishReason.STOP)
        assert stream.stop_reason == "po"


@pytest.mark.parametrize(("include", "text"), [(False, "one "), (True, "one END")])
def test_include_stop_string(include: bool, text: str) -> None:
    stream = make_stream(stop="END", include_stop_str_in_output=include)
    deltas, _ = push_all(stream, letters("one END"))
    assert "".join(deltas) == text


def test_a_longer_stop_string_does_not_delay_a_shorter_one() -> None:
    stream = make_stream(stop=["abcdef", "c"], include_stop_str_in_output=True)
    deltas, _ = push_all(stream, letters("abcdef"))
    assert deltas == ["", "", "abc"]
    assert stream.stop_reason == "c"


@pytest.mark.parametrize(
    ("include", "skip", "text"), [(False, True, ""), (False, False, ""), (True, True, ""), (True, False, "<|im_end|>")]
)
def test_end_of_sequence(include: bool, skip: bool, text: str) -> None:
    stream = make_stream(include_stop_str_in_output=include, skip_special_tokens=skip)
    deltas, reason = push_all(stream, [*letters("hi"), EOS, *letters("more")])
    assert deltas == ["h", "i", text]
    assert (reason, stream.stop_reason) == (FinishReason.STOP, None)
    assert stream.request.output_token_ids[-1] == EOS


@pytest.mark.parametrize("include", [False, True])
def test_stop_token(include: bool) -> None:
    (token_id,) = TOKENIZER.encode("!")
    stream = make_stream(stop_token_ids=[token_id], include_stop_str_in_output=include, stop=["i?"])
    deltas, reason = push_all(stream, letters("hi!"))
    assert deltas == ["h", "", "i!" if include else "i"], "held text is released"
    assert (reason, stream.stop_reason) == (FinishReason.STOP, token_id)


def test_a_stop_token_after_half_a_character() -> None:
    half = TOKENIZER.encode(FAMILY)[:1]
    deltas, _ = push_all(make_stream(), [*letters("a"), *half, EOS])
    assert deltas == ["a", "", TOKENIZER.decode(half)]


def test_multi_byte_characters_come_whole() -> None:
    token_ids = TOKENIZER.encode(FAMILY)
    assert len(token_ids) > len(FAMILY), "the test needs characters of several tokens"
    deltas, _ = push_all(make_stream(), token_ids)
    assert "".join(deltas) == FAMILY
    assert "\ufffd" not in "".join(deltas)
    assert "" in deltas


def test_stop_string_of_multi_byte_characters() -> None:
    stream = make_stream(stop="👧")
    deltas, reason = push_all(stream, TOKENIZER.encode(FAMILY))
    assert "".join(deltas) == FAMILY[: FAMILY.index("👧")]
    assert reason is FinishReason.STOP


@pytest.mark.parametrize("num_tokens", range(1, 12))
def test_max_tokens_may_end_in_half_a_character(num_tokens: int) -> None:
    token_ids = TOKENIZER.encode(FAMILY)[:num_tokens]
    deltas, reason = push_all(make_stream(max_tokens=num_tokens), token_ids)
    assert "".join(deltas) == TOKENIZER.decode(token_ids)
    assert "\ufffd" not in "".join(deltas[:-1])
    assert (len(deltas), reason) == (num_tokens, FinishReason.LENGTH)


def test_max_tokens_releases_what_was_held() -> None:
    stream = make_stream(max_tokens=3, stop="abcd")
    assert push_all(stream, letters("abc")) == (["", "", "abc"], FinishReason.LENGTH)
    assert stream.stop_reason is None


def test_a_stop_string_in_the_last_token_is_a_stop() -> None:
    assert push_all(make_stream(max_tokens=3, stop="bc"), letters("abc")) == (["a", "", ""], FinishReason.STOP)


def test_abort_releases_what_was_held() -> None:
    stream = make_stream(stop="abcd")
    half = TOKENIZER.encode(FAMILY)[:1]
    deltas, _ = push_all(stream, [*letters("abc"), *half])
    assert "".join(deltas) == ""
    assert stream.end().text == "abc" + TOKENIZER.decode(half)


some_tokens = st.lists(
    st.one_of(
        st.integers(3, TOKENIZER.vocab_size - 1),
        # Single bytes and letters: half characters, and stop strings that begin again and again.
        st.integers(17, 272),
        st.sampled_from(letters("aabbc ")),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(some_tokens, st.booleans(), st.booleans())
def test_deltas_are_the_text_of_all_tokens(token_ids: list[int], skip: bool, ends_at_limit: bool) -> None:
    """Whatever the stop strings, if none occurs."""
    text = TOKENIZER.decode(token_ids, skip_special_tokens=skip)
    stops = [stop for stop in ("ab", "cab", " a", "\ufffd\ufffd", "the") if stop not in text]
    stream = make_stream(len(token_ids) if ends_at_limit else 10**6, skip_special_tokens=skip, stop=stops)
    deltas, reason = push_all(stream, token_ids)
    if not ends_at_limit:
        deltas.append(stream.end().text)
    assert "".join(deltas) == text
    assert reason is (FinishReason.LENGTH if ends_at_limit else None)


def reference(token_ids: list[int], stops: list[str], include: bool) -> tuple[list[str], str | None]:
    """All text after each token, cut at the earliest stop string, less the longest end that may begin one."""
    decoder, so_far, seen = TOKENIZER.decode_stream(), "", []
    for token_id in token_ids:
        so_far += decoder.step(token_id)
        found = sorted((so_far.index(stop), stop) for stop in stops if stop in so_far)
        if found:
            at, stop = found[0]
            return [*seen, so_far[: at + len(stop) * include]], stop
        keep = max((n for stop in stops for n in range(len(stop)) if so_far.endswith(stop[:n])), default=0)
        seen.append(so_far[: len(so_far) - keep])
    return seen, None


@settings(max_examples=300, deadline=None)
@given(some_tokens, st.booleans(), st.data())
def test_stop_strings_of_any_text(token_ids: list[int], include: bool, data: st.DataObject) -> None:
    text = TOKENIZER.decode(token_ids)
    assume(text)
    places = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 8)).map(lambda p: text[p[0] : p[0] + p[1]])
    stops = data.draw(st.lists(st.one_of(places, st.sampled_from(["ab", "aab", "bca", "  "])), min_size=1, max_size=4))
    stream = make_stream(stop=stops, include_stop_str_in_output=include)
    deltas, reason = push_all(stream, token_ids)
    seen, stop = reference(token_ids, stops, include)
    assert ["".join(deltas[: i + 1]) for i in range(len(deltas))] == seen
    assert (reason, stream.stop_reason) == ((FinishReason.STOP, stop) if stop else (None, None))


LOGPROBS = TokenLogprobs(
    chosen=np.array([-1.0, -9.0], np.float32),
    rank=np.array([2, 30]),
    top_ids=np.array([[7, 5, 6], [7, 5, 6]]),
    top=np.array([[-0.5, -1.0, -2.0]] * 2, np.float32),
)


@pytest.mark.parametrize(
    ("row", "token_id", "num_top", "expected"),
    [
        (0, 5, 0, {5: (-1.0, 2)}),
        (0, 5, 1, {5: (-1.0, 2), 7: (-0.5, 1)}),
        (0, 5, 3, {5: (-1.0, 2), 7: (-0.5, 1), 6: (-2.0, 3)}),
        (1, 9, 2, {9: (-9.0, 30), 7: (-0.5, 1), 5: (-1.0, 2)}),
    ],
)
def test_logprob_entry(row: int, token_id: int, num_top: int, expected: dict[int, tuple[float, int]]) -> None:
    """The chosen token comes first, and once."""
    entry = logprob_entry(LOGPROBS, row, token_id, num_top)
    assert list(entry.items()) == [(key, Logprob(*value)) for key, value in expected.items()]
