"""What a batch reads: several files, compressed ones, shards; and the orders in which it serves and leaves results."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxserve.batch import FIRST, BatchFileError, BatchInput, ResultFile, Shard
from jaxserve.batch.lines import ZSTD
from tests.batch.echo import CHAT, LINES, EchoEngine, answers, line, read, run, write


def texts(inputs: BatchInput) -> list[str]:
    return [one.custom_id or one.error or "" for one in inputs]


def compressed_zstd(data: bytes) -> bytes:
    zstd = pytest.importorskip("backports.zstd")
    half = len(data) // 2
    return zstd.compress(data[:half]) + zstd.compress(data[half:])


def compressed_gzip(data: bytes) -> bytes:
    """Of two members, as of two files that were put together."""
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(data[half:])


@pytest.mark.parametrize("compress", [compressed_gzip, compressed_zstd, bytes])
def test_compressed_files_are_read_as_plain_ones(tmp_path: Path, compress: Any) -> None:
    plain = write(tmp_path / "in", *LINES)
    other = tmp_path / "compressed"
    other.write_bytes(compress(plain.read_bytes()))
    with BatchInput([plain]) as first, BatchInput([other]) as second:
        for _ in range(2):
            assert texts(first) == texts(second)
        assert len(first) == len(second) == len(LINES)


@pytest.mark.parametrize("compress", [compressed_gzip, compressed_zstd])
def test_torn_files_are_named(tmp_path: Path, compress: Any) -> None:
    torn = tmp_path / "torn"
    data = compress(b"".join(json.dumps(line(str(i))).encode() + b"\n" for i in range(1000)))
    torn.write_bytes(data[: len(data) // 3] + b"?" * 9)
    with BatchInput([torn]) as lines, pytest.raises(BatchFileError, match="torn: cannot be decompressed: "):
        list(lines)


def test_zstd_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    path = tmp_path / "in.zst"
    path.write_bytes(ZSTD)
    with BatchInput([path]) as lines, pytest.raises(BatchFileError, match=r"in.zst: zstd needs the extra zstd: pip "):
        len(lines)


def test_several_files_are_one(tmp_path: Path) -> None:
    """Numbers go on, and a custom_id belongs to one line of all."""
    first = write(tmp_path / "first", line("a"), line("b"))
    second = write(tmp_path / "second", line("b"), line("c"))
    with BatchInput([first, second]) as lines:
        found = list(lines)
    assert [one.id for one in found] == [f"batch_req_{i}" for i in (1, 2, 3, 4)]
    assert [one.custom_id for one in found] == ["a", "b", None, "c"]
    assert found[2].error == "custom_id 'b' is already that of batch_req_2"


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_shards_part_the_lines(tmp_path: Path, count: int) -> None:
    source, whole = write(tmp_path / "in", *LINES, line("0")), tmp_path / "whole"
    run(EchoEngine(), source, whole)
    parts = []
    for index in range(count):
        with BatchInput([source], Shard(index, count)) as lines:
            expected = len(lines)
        out = tmp_path / f"out-{count}-{index}"
        summary = run(EchoEngine(), source, out, Shard(index, count))
        assert summary.num_succeeded + summary.num_errors == expected
        parts += answers(out)
    assert sorted(parts) == answers(whole)


@pytest.mark.parametrize("text", ["1", "1/1", "-1/2", "2/2", "a/b", "0/0", "1/2/3", ""])
def test_other_shards_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"shard must be i/N, from 0/N to N-1/N, got {text!r}"):
        Shard.parse(text)
    assert Shard.parse("1/2") == Shard(1, 2)


def test_results_in_the_order_of_the_lines(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", *LINES), tmp_path / "out"
    run(EchoEngine(), source, out)
    before = answers(out)
    for _ in range(2):
        with ResultFile(out) as results:
            results.sort()
            with pytest.raises(BatchFileError, match="out: another run is writing to this file"):
                ResultFile(out)
        assert [result["id"] for result in read(out)] == [f"batch_req_{i + 1}" for i in range(len(LINES))]
        assert answers(out) == before
    assert run(EchoEngine(interrupt_at=1), source, out).num_skipped == len(LINES)
    assert not list(tmp_path.glob("*.sorted"))


@pytest.mark.parametrize("first", FIRST)
def test_which_go_first(tmp_path: Path, first: str) -> None:
    """Whatever it is, results are the same, and they come in that order where each takes as long."""
    prompts = ["bb", "a", "dddd", "ccc"]
    source = write(tmp_path / "in", *(line(prompt, prompt=prompt, max_tokens=1) for prompt in prompts))
    run(EchoEngine(), source, tmp_path / "out", first=first)
    order = {"input": prompts, "prefix": ["a", "bb", "ccc", "dddd"]}
    assert [result["custom_id"] for result in read(tmp_path / "out")] == order[first]


def test_a_summary(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    source = write(
        tmp_path / "in", line("a"), line("b", CHAT, messages=messages), line("c", "/v1/responses", input="hi"), "{"
    )
    summary = run(EchoEngine(), source, tmp_path / "out")
    assert (summary.num_prompt_tokens, summary.num_output_tokens) == (6 + 8 + 8, 2 + 3 + 3)
    assert summary.num_cached_tokens == 0
    assert summary.budget_use is not None
    assert 0 < summary.budget_use <= 1
    summary.elapsed_seconds, summary.budget_use, summary.num_cached_tokens = 2.0, 0.5, 11
    assert str(summary) == (
        "4 requests, 1 errors, 0 skipped in 2.0 s: 11.0 prompt tokens/s, 4.0 output tokens/s, "
        "50% of prompt tokens were cached, 50% of the token budget was used"
    )
