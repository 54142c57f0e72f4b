"""The comparison with peers, on contestants that have no model; no peer is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxserve.errors import ConfigError
from jaxserve.evaluation import figures
from jaxserve.evaluation.compare import CompareConfig, ModelFiles, Outcome, compare, rows, to_json
from jaxserve.evaluation.contestants import Contestant
from jaxserve.models.loading import hf
from jaxserve.models.loading.gguf import GGUFSource
from jaxserve.models.registry import family_of, read_config
from tests.evaluation.fake_contestant import STEP_SECONDS

ROOT = Path(__file__).parents[2]
GGUF = ROOT / "tests" / "golden" / "gguf"
JAXSERVE, VLLM, TRANSFORMERS = map(Contestant.parse, ("jaxserve", "vllm:bfloat16", "transformers:float32"))


def small(**settings) -> CompareConfig:
    lengths = {"num_prompt_tokens": 5, "num_output_tokens": 6, "max_total_tokens": 70}
    counts = {"num_requests": 4, "num_online_requests": 3, "rounds": 2}
    return CompareConfig(**{"model": str(GGUF / "qwen2.gguf"), "rate": 100.0, **lengths, **counts, **settings})


def fake(manner: str = "steady") -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("fake_contestant.py")), manner]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path))
    return tmp_path


def by_name(outcomes: list[Outcome]) -> dict[str, Outcome]:
    return {outcome.name: outcome for outcome in outcomes}


def test_contestants_take_turns_on_the_same_requests():
    said: list[str] = []
    config = small()
    outcomes = compare({JAXSERVE: fake(), VLLM: fake("chats"), TRANSFORMERS: fake()}, config, said.append)
    assert [outcome.failure for outcome in outcomes] == [None] * 3
    assert outcomes[0].packages == {"numpy": np.__version__}
    turns = [line.split()[2].rstrip(":") for line in said if "offline" in line]
    names = [outcome.name for outcome in outcomes]
    assert turns == [*names, *names[1:], names[0]]
    assert [(len(o.offline), len(o.online)) for o in outcomes] == [(2, 2), (2, 2), (2, 0)]
    for outcome in outcomes[:2]:
        assert outcome.latency.num_output_tokens == sum(r.num_output_tokens for i in range(2) for r in config.online(i))
        assert outcome.latency.tbt_seconds.min() >= STEP_SECONDS
        for number, online in enumerate(outcome.online):
            planned = np.array([request.arrival_seconds for request in config.online(number)])
            arrived = np.array([request.arrival_seconds for request in online.run.requests])
            assert arrived - arrived[0] == pytest.approx(planned - planned[0])
            assert online.run.ttft_seconds.min() >= STEP_SECONDS
    # The prompts were the same for all, and others in each round.
    first, second = outcomes[0].offline
    assert [len(tokens) for tokens in first.token_ids] == [6] * 4
    assert first.token_ids == outcomes[1].offline[0].token_ids != second.token_ids


def test_one_that_dies_is_told_with_its_stderr_and_the_others_go_on():
    said: list[str] = []
    outcomes = by_name(compare({JAXSERVE: fake(), VLLM: fake("dies")}, small(), said.append))
    failed = outcomes["vllm:bfloat16"].failure
    assert failed is not None
    assert failed.startswith("round 1, offline: died with exit code 1\n    Traceback")
    assert failed.endswith("MemoryError: no room for the KV cache")
    assert f"vllm:bfloat16 failed, {failed}" in said
    assert len(outcomes["jaxserve:float32"].online) == 2
    assert [row["rounds"] for row in rows(list(outcomes.values()))] == ["2", "0"]


@pytest.mark.parametrize(
    ("manner", "message"),
    [
        ("no model", "start: died with exit code 1\n    cannot read the model"),
        ("hangs", "warm-up: gave no answer within 3 s"),
        ("stops", "warm-up: made 1 tokens of 6"),
    ],
)
def test_failures_say_what_happened(manner, message):
    config = small(timeout_seconds=3.0 if manner == "hangs" else 60.0)
    (outcome,) = compare({VLLM: fake(manner)}, config, lambda line: None)
    assert outcome.failure == message


def test_nonsense_is_told():
    (outcome,) = compare({VLLM: [sys.executable, "-c", "print('hello')"]}, small(), lambda line: None)
    assert outcome.failure == "start: answered 'hello', expected JSON with 'ready'"


def test_table_numbers_and_plot(tmp_path):
    config = small()
    outcomes = compare({JAXSERVE: fake(), VLLM: fake(), TRANSFORMERS: fake()}, config, lambda line: None)
    table = rows(outcomes)
    assert [row["contestant"] for row in table] == ["jaxserve:float32", "vllm:bfloat16", "transformers:float32"]
    assert [row["same tokens %"] for row in table] == ["100.0"] * 3
    assert table[0]["x jaxserve:float32"] == "1.00"
    ratios = np.divide(outcomes[1].tokens_per_second, outcomes[0].tokens_per_second)
    assert float(table[1]["x jaxserve:float32"]) == pytest.approx(np.median(ratios), abs=0.006)
    assert float(table[0]["TBT p50 ms"]) >= 1000 * STEP_SECONDS
    assert table[2]["TTFT p50 s"] == table[2]["TBT p99 ms"] == "-"
    raw = json.loads(json.dumps(to_json(outcomes, config)))
    assert len(raw["contestants"][0]["output_tokens_per_second"]) == 2
    assert raw["settings"]["num_prompt_tokens"] == 5
    plot = tmp_path / "compare.png"
    figures.comparison(str(plot), outcomes)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_agreement_counts_equal_tokens():
    one, other = compare({JAXSERVE: fake(), VLLM: fake()}, small(rounds=1), lambda line: None)
    other.offline[0].token_ids[0][3:] = [0, 0, 0]
    assert other.agreement(one) == pytest.approx(21 / 24)
    assert np.isnan(Outcome("vllm:float32").agreement(one))


@pytest.mark.parametrize("name", ["qwen2.gguf", "gemma3.gguf"])
def test_peers_get_the_weights_of_the_gguf_file_as_a_folder(cache, name):
    files = ModelFiles.of(str(GGUF / name))
    assert files.gguf == str(GGUF / name)
    folder, source = Path(files.folder), GGUFSource(GGUF / name)
    assert folder.parent.parent == cache
    raw = json.loads((folder / "config.json").read_text())
    assert read_config(raw, "config.json") == source.config
    written = hf.SafetensorsSource(folder, family_of(source.config.architecture).tensor_name)
    assert written.names() == source.names()
    assert all(np.array_equal(written.read(tensor), source.read(tensor)) for tensor in source.names())
    # A folder serves as it is, and what reads GGUF files only is left out.
    assert ModelFiles.of(files.folder) == ModelFiles(None, files.folder, files.vocab_size)
    said: list[str] = []
    assert compare({Contestant.parse("openvino"): fake()}, small(model=files.folder), said.append) == []
    assert said == [f"openvino:file is left out: it reads GGUF files only, model is {files.folder!r}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "llama.cpp",
            "contestants must be of jaxserve, vllm, openvino, llama_cpp, transformers, one_by_one, got 'llama.cpp'",
        ),
        ("vllm:int8", "dtype of vllm must be one of float32, bfloat16, got 'int8'"),
        ("openvino:float32", "dtype of openvino must be one of file, got 'float32'"),
    ],
)
def test_unknown_contestants_and_dtypes(text, message):
    with pytest.raises(ConfigError, match=message):
        Contestant.parse(text)


def test_offline_alone_with_outputs_of_many_lengths():
    config = small(shortest=0.25, num_requests=40, num_online_requests=0, num_prompt_tokens=8)
    asked = config.offline()
    assert {request.num_prompt_tokens for request in asked} == set(range(2, 9))
    assert {request.num_output_tokens for request in asked} == set(range(2, 7))
    one, other = compare({JAXSERVE: fake(), TRANSFORMERS: fake()}, config, lambda line: None)
    assert [len(tokens) for tokens in one.offline[0].token_ids] == [request.num_output_tokens for request in asked]
    assert (len(one.offline), len(one.online), other.failure) == (2, 0, None)
    assert one.agreement(other) == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"num_online_requests": -1}, "num_online_requests must not be negative, got -1"),
        ({"shortest": 0.0}, r"shortest must be in \(0, 1\], got 0"),
        ({"rate": -1.0}, "rate must be above 0, got -1"),
        ({"timeout_seconds": 0.0}, "timeout_seconds must be above 0, got 0"),
        ({"max_model_len": 40}, "max_model_len must hold the longest request of 70, got 40"),
    ],
)
def test_settings_are_checked_at_the_door(settings, message):
    with pytest.raises(ConfigError, match=message):
        small(**settings)


def test_command_leaves_out_what_is_not_installed(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "compare.py"), "--peers", str(tmp_path)]
    done = subprocess.run([*command, "--contestants", "vllm", "openvino"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert f"vllm:float32 is left out: vllm is not in {tmp_path}, make peers installs it" in done.stdout
    assert "contestants: none of vllm, openvino is installed" in done.stderr
