"""lm-eval with a model of ours: log-likelihoods of a multiple choice, and a generation, from local files alone.

The model is lm-eval's local-completions, which asks a server, or where that is installed jaxserve's own.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

settings = json.loads(sys.argv[1])
folder = tempfile.TemporaryDirectory(prefix="lm-eval-")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": folder.name, "OPENAI_API_KEY": "none"}

import lm_eval  # noqa: E402, it reads the variables
from lm_eval.tasks import TaskManager  # noqa: E402

TOLERANCE = 1e-4
"""Both sides are float32 of the same server; batch mates differ."""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
target_delimiter: ""
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
GENERATION = """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{expected}}"
generation_kwargs: {until: ["\\n\\nQ:"], max_gen_toks: MAX_TOKENS, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match}]
"""


def write_task(name: str, text: str, documents: list[dict[str, Any]]) -> None:
    file = Path(folder.name, f"{name}.jsonl")
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    Path(folder.name, f"{name}.yaml").write_text(TASK.format(name=name, file=file) + text)


write_task("choice", CHOICE, settings["choices"])
generation = {"context": settings["prompt"], "expected": settings["expected"]}
write_task("generation", GENERATION.replace("MAX_TOKENS", str(settings["max_tokens"])), [generation])
if settings["harness_model"] == "jaxserve":
    import jaxserve.integrations.lm_eval  # noqa: F401, it registers the model
results = lm_eval.simple_evaluate(
    model=settings["harness_model"],
    model_args=settings["model_args"],
    tasks=["choice", "generation"],
    task_manager=TaskManager(include_path=folder.name, include_defaults=False),
    bootstrap_iters=0,
)  # fmt: skip
samples = sorted(results["samples"]["choice"], key=lambda sample: sample["doc_id"])
for document, sample in zip(settings["choices"], samples, strict=True):
    # One response to each choice: its log-likelihood, and whether it is the greedy one.
    for expected, response in zip(document["logprobs"], sample["filtered_resps"], strict=True):
        assert abs(float(response[0]) - expected) < TOLERANCE, (document, response)
assert results["results"]["choice"]["acc,none"] == settings["accuracy"], results["results"]
assert results["results"]["generation"]["exact_match,none"] == 1, results["samples"]["generation"]
