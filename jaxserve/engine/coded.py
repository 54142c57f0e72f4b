"""Which matrices of a model stay codes in memory, and how they lie there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import jax.numpy as jnp

from jaxserve.config import ResolvedConfig
from jaxserve.errors import ConfigError, ModelError
from jaxserve.kernels import cpu_codes
from jaxserve.models.loading.checkpoint import Checkpoint
from jaxserve.models.matrix import Matrix, PanelCodes, QuantisedMatrix
from jaxserve.models.weights import Weight


class CodedMatrices:
    """By name. ``plan`` gives those that a checkpoint has codes of; None: there are none, whatever ``config`` says.

    is_native: whether the device has native products. Raises ConfigError and ModelError, where it cannot be as
    ``config`` wants it.
    """

    def __init__(
        self, config: ResolvedConfig, is_native: bool, plan: Callable[[], dict[str, QuantisedMatrix]] | None
    ) -> None:
        self._planned: dict[str, QuantisedMatrix] = {}
        self._in_panels: set[str] = set()
        self._is_int8 = config.activations == "int8"
        if plan is None:
            return
        if self._is_int8 and not is_native:
            raise ConfigError(
                f"activations int8 needs native products: a CPU, dtype float32 or bfloat16 and a C++ compiler; "
                f"got dtype {config.dtype}"
            )
        is_auto = config.quantization == "auto"
        if config.quantization == "codes" or (
            is_auto and is_native and (self._is_int8 or cpu_codes.outruns(jnp.dtype(config.dtype)))
        ):
            self._planned = plan()
        self._in_panels = {name for name, matrix in self._planned.items() if is_native and PanelCodes.holds(matrix)}
        if is_auto:
            self._planned = {name: matrix for name, matrix in self._planned.items() if name in self._in_panels}
        if self._is_int8 and not self._in_panels:
            raise ModelError(
                f"{config.model}: activations int8 needs weights that are codes of 4 or 8 bits, found none"
            )
        if config.quantization == "codes" and not self._planned:
            raise ModelError(
                f"{config.model}: quantization codes needs quantised weights of a supported kind, found none"
            )

    @property
    def names(self) -> set[str]:
        return set(self._planned)

    @property
    def skip_padding(self) -> bool:
        """See Matrix.skips_padding."""
        return len(self._in_panels) == len(self._planned)

    def abstract(self) -> dict[str, Matrix]:
        """As programs take them, without values."""
        return {
            name: PanelCodes.abstract(matrix, is_int8=self._is_int8) if name in self._in_panels else matrix
            for name, matrix in self._planned.items()
        }

    def load(self, checkpoint: Checkpoint, weights: Mapping[str, Weight]) -> Iterator[tuple[str, Matrix]]:
        """The same with values, one after the other, so that memory need not hold two forms of all."""
        for name, matrix in checkpoint.load_codes(self._planned, weights) if self._planned else ():
            yield name, PanelCodes.of(matrix, is_int8=self._is_int8) if name in self._in_panels else matrix
