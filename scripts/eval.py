"""lm-evaluation-harness with jaxserve as its model. Flags are the harness's; --model_args are pretrained, max_gen_toks
and the engine's settings. An evaluation that was interrupted goes on from the answers in --use_cache.

eval.py --tasks hellaswag gsm8k --model_args pretrained=smollm2-135m token_budget=512 --output_path results
eval.py --tasks gsm8k --num_fewshot 5 --apply_chat_template --log_samples --output_path results --use_cache answers
eval.py --include_path TASKS --tasks mine            tasks of one's own: YAML files, with data in JSONL beside them
eval.py humaneval samples.jsonl --use_cache answers  completions of HumanEval, which nothing here executes
eval.py run --help                                   all flags; also: ls tasks, validate
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jaxserve.errors import ConfigError, ModelError, RequestError

TASKS = Path(__file__).parent / "eval_tasks"
"""Tasks whose data packages carry."""
HUMANEVAL = "humaneval_completions"


def harness(argv: Sequence[str]) -> None:
    """The harness's command line, which evaluates jaxserve where no other ``--model`` is named."""
    from lm_eval._cli import HarnessCLI

    import jaxserve.integrations.lm_eval  # noqa: F401, it registers the model

    own = [] if argv[:1] in (["ls"], ["validate"]) else ["run", "--model", "jaxserve"]
    sys.argv = [sys.argv[0], *own, *(argv[1:] if argv[:1] == ["run"] else argv)]
    cli = HarnessCLI()
    cli.execute(cli.parse_args())


def humaneval(argv: Sequence[str]) -> None:
    """Write HumanEval's completions as its own, sandboxed, evaluate_functional_correctness reads them."""
    parser = argparse.ArgumentParser(
        prog="eval.py humaneval", description=humaneval.__doc__, epilog="and the harness's"
    )
    parser.add_argument("samples", type=Path, help="JSONL of {task_id, completion}")
    args, rest = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        where = ["--include_path", str(TASKS), "--output_path", folder, "--log_samples", "--predict_only"]
        harness(["--tasks", HUMANEVAL, *where, *rest])
        (logged,) = Path(folder).rglob(f"samples_{HUMANEVAL}_*.jsonl")
        answers = [json.loads(line) for line in logged.read_text(encoding="utf-8").splitlines()]
    with args.samples.open("w", encoding="utf-8") as file:
        for answer in answers:
            sample = {"task_id": answer["doc"]["task_id"], "completion": answer["resps"][0][0]}
            file.write(json.dumps(sample) + "\n")
    print(f"{args.samples}: {len(answers)} completions; evaluate_functional_correctness of human-eval runs them")


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        if argv[0] == "humaneval":
            humaneval(argv[1:])
        else:
            harness(argv)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "lm_eval":
            raise
        print("eval.py: error: lm-evaluation-harness is not installed: pip install 'jaxserve[eval]'", file=sys.stderr)
        return 2
    except (ConfigError, ModelError, RequestError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eval.py: interrupted; with --use_cache, run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
