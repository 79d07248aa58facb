"""Times of short calls on a device, several contenders in turn.

A call is given to a device and is under way when it returns, so one time is of as many calls as
take a tenth of a second or so, waited for together. Medians are compared.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

AT_ONCE, MOST = 0.1, 200  # seconds of the calls that are timed together, and how many at most


class Contender(NamedTuple):
    """A call, and what waits for its result and for all before it."""

    call: Callable[[], Any]
    wait: Callable[[Any], Any]

    def seconds(self, times: int) -> float:
        """Of a call, the mean of so many at once."""
        begun = time.perf_counter()
        for _ in range(times):
            result = self.call()
        self.wait(result)
        return (time.perf_counter() - begun) / times


def in_turn(
    contenders: Mapping[str, Contender], rounds: int, at_once: float = AT_ONCE, pause: float = 0.0
) -> dict[str, float]:
    """Median seconds of each contender's call; all take turns, `rounds` times.

    Args:
      at_once: seconds of the calls that are timed together.
      pause: seconds before each turn, in which the others' threads fall asleep.
    """
    times = {}
    for name, contender in contenders.items():
        contender.seconds(1)  # compiles
        times[name] = max(1, min(MOST, int(at_once / max(contender.seconds(1), 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            time.sleep(pause)
            seconds[name].append(contender.seconds(times[name]))
    return {name: statistics.median(found) for name, found in seconds.items()}
