"""Stopping `lra run` on Ctrl-C, SIGTERM or SIGHUP.

While a stage trains, `callbacks.Stop` ends it between two steps with a checkpoint. Everywhere else the run stops at
once. Of several processes that train together, one may wait for another inside a collective operation, where Python
handles no signal: there a thread ends the process.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 6.0
"""Seconds after a signal in which processes that train together may stop by themselves."""
EXIT_CODE = 130

_begun = threading.Event()


class Stopped(BaseException):
    """A signal asked this process to stop; its name is the message. Not an Exception, so that no handler of errors
    swallows it."""


def mark_resumable() -> None:
    """Note that the run has a folder, from which --resume goes on."""
    _begun.set()


def is_resumable() -> bool:
    return _begun.is_set()


def heeded() -> list[signal.Signals]:
    """The signals that stop a run. SIGHUP stays ignored where the parent process ignores it, as nohup does."""
    return [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]


@contextmanager
def listening(alone: bool, leads: bool, report: Callable[[str], None]) -> Iterator[None]:
    """Raise Stopped in the main thread on a signal.

    alone: whether this is the only process of the run. Otherwise a process that is still there GRACE seconds after the
    signal is ended by a thread. leads: whether this is the first process, which calls report(name of the signal) before
    that. The others also end when their parent process is gone, and with exit code 0: Lightning kills the first process
    when another one fails.
    """
    _begun.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    latest = 0.0

    def stop(number: int, _: Any) -> None:
        nonlocal latest
        # `timeout` and a shell's Ctrl-C deliver the same signal twice
        again, latest = time.monotonic() - latest < 1, time.monotonic()
        if not again:
            raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in heeded()}
    end_watch = (lambda: None) if alone else _watch(leads, report)
    try:
        yield
    finally:
        end_watch()
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(leads: bool, report: Callable[[str], None]) -> Callable[[], None]:
    """Start the thread that ends this process after a signal. Returns a function that ends the thread instead."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    parent, finished = os.getppid(), threading.Event()

    def watch() -> None:
        number = 0
        while number not in SIGNALS:
            if select.select([reader], [], [], 1.0)[0]:
                number = os.read(reader, 1)[0]
            elif not leads and os.getppid() != parent:
                os._exit(0)
            if finished.is_set():
                return
        if finished.wait(GRACE):
            return
        if leads:
            report(signal.Signals(number).name)
        os._exit(EXIT_CODE if leads else 0)

    def end() -> None:
        finished.set()
        signal.set_wakeup_fd(before)

    threading.Thread(target=watch, name="end-within-grace", daemon=True).start()
    return end
