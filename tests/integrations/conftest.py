from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token for each word, so that texts can hold any tokens of the tiny checkpoints."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"<{i}>": i for i in range(96)}, unk_token="<0>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    return folder
