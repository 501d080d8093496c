"""Code of a user's own, run so that its errors are told and not thrown."""

from __future__ import annotations

import contextlib
import threading
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Outcome(contextlib.AbstractContextManager["Outcome"]):
    """What a user's code returned or raised."""

    def __init__(self) -> None:
        self.value: Any = None
        self.error: BaseException | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> bool:
        self.error = error
        # Ctrl-C and sys.exit end the program.
        return isinstance(error, Exception)


def run_limited(call: Callable[[], Any], seconds: float) -> Outcome | None:
    """Calls a user's function, in a thread of its own if there is a time limit; None if it is exceeded."""
    outcome = Outcome()

    def work() -> None:
        with outcome:
            outcome.value = call()

    if not seconds:
        work()
        return outcome
    # A daemon: a thread cannot be ended from outside, and the program must not wait for one that hangs.
    thread = threading.Thread(target=work, daemon=True, name="reward function")
    thread.start()
    thread.join(seconds)
    return None if thread.is_alive() else outcome


def one_line(error: BaseException) -> str:
    """Type and message of an error on one line, and the place in the user's code."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    here = Path(__file__).parent
    callers = (here, here.parent / "environments" / "calling.py")
    own = [frame for frame in frames if not {Path(frame.filename), Path(frame.filename).parent} & set(callers)]
    place = f" ({own[0].filename}:{own[0].lineno})" if own else ""
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"
