"""One piece of work at a time beside the training loop, and its errors. Knows neither Orbax nor JAX."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_jax.parallel import stopping


class Background:
    """Runs one piece of work at a time in a thread; its error is raised in the thread that asks.

    Python waits for the thread when it exits, whatever the reason.
    """

    def __init__(self) -> None:
        self._work: concurrent.futures.Future[None] | None = None

    @property
    def running(self) -> bool:
        """True if work was started and is not done."""
        return self._work is not None and not self._work.done()

    def start(self, work: Callable[[], None]) -> None:
        """Starts the work, once the work before is done; SIGTERM waits for it (`parallel.stopping`).

        Raises:
          BaseException: that of the work before.
        """
        self.join()

        def told() -> None:
            try:
                work()
            finally:
                stopping.beside("")

        stopping.beside("saving")
        executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="background")
        self._work = executor.submit(told)
        executor.shutdown(wait=False)

    def join(self) -> None:
        """Waits until the work is done.

        Raises:
          BaseException: that of the work, once.
        """
        if self._work is not None:
            concurrent.futures.wait([self._work])
            work, self._work = self._work, None
            work.result()


def saving_limit(size: int) -> float:
    """Seconds in which `size` bytes must be written, synced and hashed, at a tenth of the speed of a current disk."""
    return 300.0 + size / 20e6


def refusal(error: OSError | ValueError) -> str | None:
    """The system's message when it refused to write; None for an error of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # TensorStore raises ValueError with the system's error number in its text.
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return None if code is None else os.strerror(int(code[1]))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what Orbax's threads print of an error that is raised as well. The main thread's own errors are printed."""
    loggers = [logging.getLogger(name) for name in ("asyncio", "absl")]
    before, hooks = [logger.disabled for logger in loggers], (sys.unraisablehook, sys.excepthook)

    def unraisable(error: Any) -> None:
        if issubclass(error.exc_type, KeyboardInterrupt):
            hooks[0](error)

    def uncaught(*error: Any) -> None:  # TensorStore's threads call it too
        if threading.current_thread() is threading.main_thread():
            hooks[1](*error)

    sys.unraisablehook, sys.excepthook = unraisable, uncaught
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        sys.unraisablehook, sys.excepthook = hooks
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def collect_reports() -> None:
    """Has Orbax make the last of its reports of an error, some of which are made when its futures are collected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        gc.collect()
    time.sleep(0.2)
