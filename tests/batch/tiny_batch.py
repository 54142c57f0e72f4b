"""scripts/batch.py in a process of its own, on a tiny model, for reports that are made by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tokenizers

from tests.models.golden import Golden

SCRIPT = Path(__file__).parents[2] / "scripts" / "batch.py"


class TinyBatch:
    """Starts runs over ``source``; ``folder`` gets a tokenizer."""

    def __init__(self, folder: Path, source: Path, *flags: str) -> None:
        model = Golden("llama_gqa_tied")
        save_tokenizer(folder)
        self._source = source
        self._flags = ["--model", str(model.checkpoint), "--tokenizer", str(folder), "--block-size", "8", *flags]
        self._flags += ["--max-model-len", str(model.length)]

    def start(self, destination: Path, *flags: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(SCRIPT), str(self._source), str(destination), *self._flags, *flags]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def save_tokenizer(folder: Path) -> None:
    words = {f"<{i}>": i for i in range(96)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<0>"))
    tokenizer.save(str(folder / "tokenizer.json"))


def num_results(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
