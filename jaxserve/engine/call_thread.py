"""A thread for work that must not be cut short, whatever interrupts those who wait for it.

A signal's exception (a notebook's stop button, an alarm) is raised between any two bytecodes of the main thread. Inside
a step it would leave the engine half changed, its donated arrays lost. So the engine's work is done in a thread of its
own, which Python never interrupts, and the caller only waits.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Generator
from queue import Empty, SimpleQueue
from typing import NamedTuple

WAKE_SECONDS = 0.1
"""How often a waiting caller looks for an exception that another thread has raised in it; a signal's comes at once."""


class CallThread:
    """Runs calls one after the other, in the order in which they came, whichever threads they came from.

    Callers and thread share ``SimpleQueue``s and one attribute only: an interrupt can neither tear those nor keep them
    locked. The thread ends when nobody holds this object any more.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        threading.Thread(target=_serve, args=(self._calls,), name="calls", daemon=True).start()
        weakref.finalize(self, self._calls.put, None)

    def run[Item](self, work: Generator[Item | None], receive: Callable[[Item], object]) -> None:
        """Run the generator ``work`` in the thread, to its end, and ``receive`` here what it yields but None.

        Raises what ``work`` raises. When the caller is interrupted, ``work`` is closed at its next yield, so that its
        ``finally`` can clean up; that too has happened when this raises, unless a second interrupt comes meanwhile.
        """
        call: _Call[Item] = _Call(work)
        try:
            self._calls.put(call)
            call.wait(receive)
        except BaseException:
            call.abandoned = True
            # Once more, for the interrupt may have come before the first time; a call that has run ends at once.
            self._calls.put(call)
            call.wait(lambda item: None)
            raise
        if call.error is not None:
            raise call.error


class _End(NamedTuple):
    """The last thing that a call hands over."""


class _Call[Item]:
    def __init__(self, work: Generator[Item | None]) -> None:
        self.work = work
        self.items: SimpleQueue[Item | _End] = SimpleQueue()
        self.error: BaseException | None = None
        self.abandoned = False

    def wait(self, receive: Callable[[Item], object]) -> None:
        """Receive the items up to the end of the call."""
        while not isinstance(item := self._next(), _End):
            receive(item)

    def _next(self) -> Item | _End:
        while True:
            with contextlib.suppress(Empty):
                return self.items.get(timeout=WAKE_SECONDS)

    def run(self) -> None:
        """In the thread; a second time there is nothing left to do."""
        try:
            with contextlib.closing(self.work):
                for item in self.work:
                    if item is not None:
                        self.items.put(item)
                    if self.abandoned:
                        break
        except BaseException as error:  # whatever it is, it is the caller's
            self.error = error
        self.items.put(_End())


def _serve(calls: SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        call.run()
        del call  # it holds the engine, whose memory is free as soon as its owner lets go of it
