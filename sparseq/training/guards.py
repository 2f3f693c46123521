"""Ends of a training that nobody planned: signals that ask it to stop, and losses that run away."""

import math
import os
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, NoReturn

# Logged losses whose median is judged: up to two outliers among them change nothing.
_WINDOW = 5
# Nats that the loss must have risen by at least, whatever the factor says.
_LEAST_RISE = 2.0


class DivergenceError(ValueError):
    """The training loss, or a weight, is not finite, or the loss has risen far above its lowest value."""


class LossWatch:
    """Judges the logged losses of a training.

    It diverges when the median of the last five logged losses exceeds `factor` times the lowest such median so far,
    and that by at least 2 nats. A spike of one or two logs is not a divergence, nor is a loss that stays high.

    Args:
        factor: How many times the lowest median is too much; 0 judges nothing but finiteness.
        losses: What was logged before, oldest first.
    """

    def __init__(self, factor: float, losses: Iterable[float] = ()) -> None:
        self.factor = factor
        self.lowest = math.inf
        self.last: list[float] = []
        for loss in losses:
            self.add(loss)

    def add(self, loss: float) -> None:
        """Take note of one more logged loss."""
        self.last = [*self.last, loss][-_WINDOW:]
        self.lowest = min(self.lowest, self.median)

    @property
    def median(self) -> float:
        """Median of the last five logged losses, or of as many as there are."""
        return statistics.median(self.last) if self.last else math.inf

    @property
    def limit(self) -> float:
        """The loss above which the training diverges."""
        return max(self.factor * self.lowest, self.lowest + _LEAST_RISE) if self.factor else math.inf

    @property
    def is_suspicious(self) -> bool:
        """Whether the last logged loss alone is above the limit."""
        return bool(self.last) and not self.last[-1] <= self.limit

    @property
    def is_diverging(self) -> bool:
        """Whether the median is above the limit."""
        return len(self.last) == _WINDOW and self.median > self.limit


class StopRequest:
    """Within it, SIGTERM and Ctrl-C are noted instead of ending the process; a second Ctrl-C acts at once.

    Signals that are ignored (as under `nohup`) stay ignored, and threads other than the main one leave all as it is.

    Attributes:
        signum: The signal that came, or None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                if (previous := signal.getsignal(signum)) not in (signal.SIG_IGN, None):
                    self._previous[signum] = previous
                    signal.signal(signum, self._note)
        return self

    def __exit__(self, *details: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the signals their usual effect again."""
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)
        self._previous = {}

    def act(self, signum: int) -> NoReturn:
        """Let a signal have the effect that it would have had, and end the program in any case.

        Raises:
            KeyboardInterrupt: For Ctrl-C.
            SystemExit: For SIGTERM, with status 143; a handler of the program's own is called before.
        """
        previous: Callable[[int, FrameType | None], object] | Any = self._previous.get(signum, signal.SIG_DFL)
        self.restore()
        if callable(previous):
            previous(signum, None)
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        # What a shell reports for a command ended by a signal.
        sys.exit(128 + signum)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == self.signum == signal.SIGINT:
            self.act(signum)
        if self.signum is None:
            self.signum = signum
            # Not `print`: the signal may have come in the middle of one.
            message = f"\n{signal.Signals(signum).name}: stopping after this step, with a checkpoint\n"
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, message.encode())
