"""What importing the package must not do."""

from __future__ import annotations

import subprocess
import sys

IMPORT_ALL = """
import importlib, pkgutil, sys
import jaxserve
for module in pkgutil.walk_packages(jaxserve.__path__, "jaxserve."):
    if not any(name in module.name for name in ("triton", "mosaic", ".gpu_check.worker", ".integrations.")):
        importlib.import_module(module.name)
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized(), "opentelemetry.sdk" in sys.modules)
"""


def test_no_module_uses_a_device_when_it_is_imported() -> None:
    """It would take a GPU's memory before the engine can say how much, and come before ``jax.distributed``. Nor does
    one load what only spans need.
    """
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.returncode) == ("False False\n", 0), done.stderr
