"""scripts/eval.py, as far as it goes without the harness."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from scripts import eval as script

MODULE = "jaxserve.integrations.lm_eval"


def test_without_the_harness_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for argv in (["--tasks", "hellaswag"], ["humaneval", "samples.jsonl"]):
        assert script.main(argv) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines == ["eval.py: error: lm-evaluation-harness is not installed: pip install 'jaxserve[eval]'"]


@pytest.fixture
def command_lines(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the harness's command line gets; where samples are logged, it answers as the harness does."""
    seen: list[list[str]] = []

    class HarnessCLI:
        def parse_args(self) -> list[str]:
            return sys.argv[1:]

        def execute(self, args: list[str]) -> None:
            seen.append(args)
            if "--output_path" in args:
                folder = Path(args[args.index("--output_path") + 1], "model")
                folder.mkdir()
                answer = {"doc": {"task_id": "HumanEval/0"}, "resps": [["    return 1\n"]]}
                Path(folder, f"samples_{script.HUMANEVAL}_now.jsonl").write_text(json.dumps(answer) + "\n")

    for name in ("lm_eval", "lm_eval._cli", MODULE):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["lm_eval._cli"], "HarnessCLI", HarnessCLI, raising=False)
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    return seen


def test_the_model_is_jaxserve_unless_another_is_named(command_lines: list[list[str]]) -> None:
    for argv in (["--tasks", "t"], ["run", "--tasks", "t"], ["--tasks", "t", "--model", "hf"], ["ls", "tasks"]):
        assert script.main(argv) == 0
    mine = ["run", "--model", "jaxserve", "--tasks", "t"]
    assert command_lines == [mine, mine, [*mine, "--model", "hf"], ["ls", "tasks"]]


def test_completions_of_humaneval_are_those_that_the_harness_logged(
    command_lines: list[list[str]], tmp_path: Path
) -> None:
    samples = tmp_path / "samples.jsonl"
    assert script.main(["humaneval", str(samples), "--limit", "1"]) == 0
    assert json.loads(samples.read_text()) == {"task_id": "HumanEval/0", "completion": "    return 1\n"}
    (arguments,) = command_lines
    assert arguments[-2:] == ["--limit", "1"]
    assert {"--predict_only", "--log_samples", script.HUMANEVAL} < set(arguments)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([]) == script.main(["--help"]) == 0
    assert "--use_cache" in capsys.readouterr().out
