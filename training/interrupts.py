# SPDX-License-Identifier: MIT
"""SIGINT and SIGTERM as a wish to stop: the loop finishes what it is at, saves, and ends with a line that tells how to go on.
And the end of a program: its exit code, and the line of one of its processes."""

import signal
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from training.launch import joined, watched
from training.ranks import everybodys, here, leave, one_voice, tells


class Stopped(Exception):
    """A signal ended the run in good order."""

    def __init__(self, message: str, caught: signal.Signals):
        super().__init__(message)
        self.exit_code = 128 + caught
        everybodys(self)


class Interrupts:
    """While inside, the first SIGINT or SIGTERM is remembered in `caught`, for the loop to end after its step; the second one
    ends the process at once."""

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        try:
            self.before = {s: signal.signal(s, self.catch) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread, which alone may handle signals
            pass
        return self

    def agreed(self) -> signal.Signals | None:
        """What any process of the run has caught. All must ask at the same places and go by this answer: a signal may reach
        one of them, or come to each at another step."""
        number = max(here().gather(lambda: int(self.caught or 0)))
        return signal.Signals(number) if number else None

    def catch(self, number: int, frame: Any) -> None:
        self.caught = signal.Signals(number)
        tqdm.write(f"{self.caught.name}: finishes this step and saves; once more ends at once")
        for s in self.before:
            signal.signal(s, signal.SIG_DFL)

    def __exit__(self, *_: Any) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)


def exit_code(work: Callable[[], object], complain: Callable[[BaseException], tuple[int, str]]) -> int:
    """Does work(), as one process or as one of several. complain(error): (exit code, what to say), of whatever ended it."""
    try:
        with joined(), one_voice():
            watched(work)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        code, line = complain(error)
        if tells(error):
            print(line, file=sys.stdout if isinstance(error, Stopped) else sys.stderr, flush=True)
        leave(error)
        return code
