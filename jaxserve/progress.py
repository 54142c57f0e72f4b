"""The progress bar of calls that may be interrupted."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import ClassVar

with warnings.catch_warnings():
    # In a notebook without ipywidgets tqdm draws its bar as text, and a warning would stand above every one of them.
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm


class _Bar(tqdm):
    _lock: ClassVar = threading.RLock()
    """Instead of tqdm's lock, of several parts, which an interrupt may tear."""


@contextlib.contextmanager
def progress_bar(desc: str, total: int, unit: str, *, initial: int = 0, disable: bool = False) -> Iterator[tqdm]:
    """A bar as tqdm draws it, open while the block runs.

    An exception inside tqdm, as a signal's or a closed terminal's, leaves tqdm's lock held, and the bars of other
    threads would wait for ever. Here it is free when the block has ended, however it ended.
    """
    try:
        with _Bar(desc=desc, total=total, unit=unit, initial=initial, disable=disable) as bar:
            yield bar
    finally:
        with contextlib.suppress(RuntimeError):  # raised once this thread does not hold it
            while True:
                _Bar._lock.release()
