"""Ray Data on jaxserve's engine: a class for ``ray.data.Dataset.map_batches``, whose actors each have an engine.

>>> dataset = ray.data.read_json("prompts.jsonl").map_batches(
...     LLMPredictor,
...     fn_constructor_kwargs={"model": "smollm2-135m", "sampling_params": {"max_tokens": 64}},
...     batch_size=256, concurrency=4, num_gpus=1,
... )  # fmt: skip
>>> dataset.write_parquet("outputs")

Ray divides the rows, gives each actor GPUs of its own, starts those anew that have died, and with a
``CheckpointConfig`` in its ``DataContext`` leaves out what an earlier run has written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxserve.errors import RequestError
from jaxserve.llm import LLM
from jaxserve.prompts import TokensPrompt
from jaxserve.sampling_params import SamplingParams

Batch = dict[str, np.ndarray]
"""Columns by name, as Ray has batches by default."""


class LLMPredictor:
    """Adds to each row with a ``prompt``, or else with ``messages`` of a chat, what the model makes of it.

    New columns: ``generated_text``, ``finish_reason``, ``num_prompt_tokens``, ``num_generated_tokens``, and ``error``:
    why a row could not be served, empty where it was. A bad row fails alone.
    ``sampling_params``: fields of SamplingParams, for all rows; those left open have the model's defaults. ``config``:
    fields of EngineConfig. Raises ConfigError, ModelError, and RequestError for what no row could be served with.
    """

    def __init__(
        self, model: str = "smollm2-135m", *, sampling_params: Mapping[str, Any] | None = None, **config: Any
    ) -> None:
        given = dict(sampling_params or {})
        SamplingParams(**given)  # before the weights are loaded
        if given.get("n", 1) != 1:
            raise RequestError(f"n must be 1, an output for each row, got {given['n']!r}")
        self._llm = LLM(model, show_progress=False, **config)
        self._params = SamplingParams(**{**self._llm.engine.sampling_defaults, **given})

    def __call__(self, batch: Batch) -> Batch:
        """Raises RequestError for a batch that has neither column."""
        source = next((name for name in ("prompt", "messages") if name in batch), None)
        if source is None:
            raise RequestError(f"a batch must have the column prompt or messages, got {', '.join(batch)}")
        rows = [self._row(source, value) for value in batch[source]]
        served = [row for row in rows if row["token_ids"]]
        prompts = [TokensPrompt(prompt_token_ids=row["token_ids"]) for row in served]
        for row, output in zip(served, self._llm.generate(prompts, self._params, use_tqdm=False), strict=True):
            (completion,) = output.outputs
            row["generated_text"], row["finish_reason"] = completion.text, completion.finish_reason
            row["num_prompt_tokens"] = len(output.prompt_token_ids)
            row["num_generated_tokens"] = len(completion.token_ids)
        columns = [name for name in _UNSERVED if name != "token_ids"]
        return batch | {name: np.array([row[name] for row in rows]) for name in columns}

    def _row(self, source: str, value: Any) -> dict[str, Any]:
        """A row's tokens, or its error."""
        engine = self._llm.engine
        try:
            if source == "prompt":
                token_ids = engine.tokenizer.encode(value)
            else:
                text = engine.tokenizer.apply_chat_template(list(value))
                token_ids = engine.tokenizer.encode(text, add_special_tokens=False)
            engine.validate(token_ids, self._params)
        except RequestError as error:
            return _UNSERVED | {"error": str(error)}
        return _UNSERVED | {"token_ids": token_ids}


_UNSERVED: dict[str, Any] = {
    "token_ids": [], "generated_text": "", "finish_reason": "error", "num_prompt_tokens": 0, "num_generated_tokens": 0,
    "error": "",
}  # fmt: skip
"""What a row has that is not served."""
