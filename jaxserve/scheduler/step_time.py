"""How long a step takes: a model linear in what determines it, fitted to measured steps."""

from __future__ import annotations

import bisect
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from jaxserve.errors import ConfigError
from jaxserve.scheduler.batch import Chunk
from jaxserve.scheduler.buckets import bucket_of


def num_seen_keys(start: int, num_tokens: int, window: int | None) -> int:
    """Keys that rows at ``[start, start + num_tokens)`` attend to, summed over the rows."""
    full = num_tokens * start + num_tokens * (num_tokens + 1) // 2
    if window is None:
        return full
    # The row at p sees p + 1 keys, of which p + 1 - window are out of sight where that is positive.
    first, last = max(0, start + 1 - window), max(0, start + num_tokens - window)
    return full - (last * (last + 1) - first * (first - 1)) // 2


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What determines a step's time."""

    num_rows: int
    """Of the compiled program: the batch's tokens and padding."""
    num_decodes: int = 0
    """Their rows, those of drafts included."""
    num_kv_tokens: int = 0
    """Keys that the decodes attend to."""
    num_prefill_tokens: int = 0
    num_pairs: int = 0
    """Query-key pairs of the prefill chunks."""

    @classmethod
    def of(cls, chunks: Iterable[Chunk], buckets: Sequence[int], window: int | None = None) -> Self:
        """``window``: the model's widest attention window in tokens, where every layer has one."""
        decodes, num_kv_tokens, num_prefill_tokens, num_pairs = 0, 0, 0, 0
        for chunk in chunks:
            keys = num_seen_keys(chunk.start, chunk.num_tokens, window)
            is_single = chunk.num_tokens - chunk.num_drafts == 1
            if is_single and chunk.samples and chunk.start >= chunk.request.num_prompt_tokens:
                decodes += chunk.num_tokens
                num_kv_tokens += keys
            else:
                num_prefill_tokens += chunk.num_tokens
                num_pairs += keys
        num_rows = bucket_of(decodes + num_prefill_tokens, buckets)
        return cls(num_rows, decodes, num_kv_tokens, num_prefill_tokens, num_pairs)

    def with_chunk(self, start: int, num_tokens: int, buckets: Sequence[int], window: int | None = None) -> BatchShape:
        """The same batch with one more prefill chunk."""
        num_prefill_tokens = self.num_prefill_tokens + num_tokens
        return dataclasses.replace(
            self,
            num_rows=bucket_of(self.num_decodes + num_prefill_tokens, buckets),
            num_prefill_tokens=num_prefill_tokens,
            num_pairs=self.num_pairs + num_seen_keys(start, num_tokens, window),
        )


class Sample(NamedTuple):
    shape: BatchShape
    seconds: float


class RelativeError(NamedTuple):
    """Of predictions for steps that the model was not fitted to, as shares of the measured times."""

    median: float
    p90: float


@dataclass(frozen=True)
class StepTimeModel:
    """Seconds of a step: ``base_seconds`` of its program, and what its attention adds.

    Dense layers cost what the rows do, padding included, so the base is by bucket and may rise in any way (memory-bound
    at first, compute-bound later: arXiv 2403.02310, section 3.1); attention costs by the keys that are read.
    """

    base_seconds: Mapping[int, float]
    """By rows, rising in both."""
    seconds_per_kv_token: float
    seconds_per_pair: float
    interpolates: bool = False
    """Whether rows between those that were measured cost what lies between: where padding costs nothing."""

    @classmethod
    def fit(cls, samples: Sequence[Sample]) -> Self:
        """Non-negative least squares of the relative errors; a larger program never gets a smaller base."""
        import numpy as np  # like scipy a third of the start's imports, for those who measure only
        from scipy.optimize import nnls

        rows = sorted({sample.shape.num_rows for sample in samples})
        seconds = np.array([sample.seconds for sample in samples])
        # The base of a bucket is the sum of the increments up to it, none of which is negative.
        increments = np.array([[sample.shape.num_rows >= r for r in rows] for sample in samples], float)
        keys = np.array([[s.shape.num_kv_tokens, s.shape.num_pairs] for s in samples], float)
        scales = np.maximum(keys.max(axis=0), 1.0)
        matrix = np.hstack([increments, keys / scales]) / seconds[:, None]
        coefficients, _ = nnls(matrix, np.ones(len(samples)))
        bases = np.cumsum(coefficients[: len(rows)])
        per_kv_token, per_pair = coefficients[len(rows) :] / scales
        return cls(dict(zip(rows, bases.tolist(), strict=True)), float(per_kv_token), float(per_pair))

    def predict(self, shape: BatchShape) -> float:
        """Seconds. A program that was not measured counts as the next larger one, or in proportion to the largest."""
        rows = list(self.base_seconds)
        at = bisect.bisect_left(rows, shape.num_rows)
        if at == len(rows):
            base = self.base_seconds[rows[-1]] * shape.num_rows / rows[-1]
        else:
            base = self.base_seconds[rows[at]]
            if self.interpolates and at > 0:
                fewer, less = rows[at - 1], self.base_seconds[rows[at - 1]]
                base = less + (base - less) * (shape.num_rows - fewer) / (rows[at] - fewer)
        return base + self.seconds_per_kv_token * shape.num_kv_tokens + self.seconds_per_pair * shape.num_pairs


@dataclass(frozen=True)
class Pace:
    """How fast steps must be, and how fast they are."""

    step_seconds: float
    """Most that a step with decodes may be predicted to take."""
    step_time: StepTimeModel

    @classmethod
    def of(cls, slo_tbt_seconds: float, step_time: StepTimeModel, error: RelativeError) -> Pace:
        """An objective for the P99 of the TBT, with room for predictions that are as wrong as one in ten is."""
        return cls(slo_tbt_seconds / (1 + error.p90), step_time)


def held_out_error(samples: Sequence[Sample], num_folds: int = 4, seed: int = 0) -> RelativeError:
    """Every sample is predicted by a model fitted to the other folds."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(samples))
    errors = []
    for fold in np.array_split(order, num_folds):
        held_out = set(fold.tolist())
        model = StepTimeModel.fit([sample for i, sample in enumerate(samples) if i not in held_out])
        errors += [abs(model.predict(samples[i].shape) / samples[i].seconds - 1) for i in held_out]
    return RelativeError(float(np.median(errors)), float(np.percentile(errors, 90)))


@dataclass(frozen=True)
class Profile:
    """A step-time model and what it was measured on, as kept in a file."""

    model: str
    dtype: str
    device: str
    date: str
    """ISO 8601."""
    error: RelativeError
    step_time: StepTimeModel

    def to_json(self) -> str:
        # JSON keys are strings, so the bases become pairs.
        step_time = vars(self.step_time) | {"base_seconds": list(self.step_time.base_seconds.items())}
        return json.dumps(vars(self) | {"error": self.error._asdict(), "step_time": step_time}, indent=2) + "\n"

    @classmethod
    def read(cls, path: str) -> Self:
        """From a file. Raises ConfigError."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"profile: cannot read {path!r}: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ValueError if ``text`` is no profile."""
        try:
            fields = json.loads(text)
            step_time = fields["step_time"]
            bases = {int(rows): float(seconds) for rows, seconds in step_time["base_seconds"]}
            if not bases or list(bases) != sorted(bases):
                raise ValueError("base_seconds must be pairs of rising rows and seconds")
            per_kv_token, per_pair = (float(step_time[name]) for name in ("seconds_per_kv_token", "seconds_per_pair"))
            model = StepTimeModel(bases, per_kv_token, per_pair)
            return cls(**fields | {"error": RelativeError(**fields["error"]), "step_time": model})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a profile of step times: {error!r}") from error
