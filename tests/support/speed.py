"""How fast this machine is just now: bounds on processor time are for one on which they were measured."""

import time

_USUAL = 0.0205  # seconds for the loop below; the same virtual machine takes from 0.02 to 0.035 within a minute


def slowness() -> float:
    """What a bound on processor time is to be multiplied by, at least 1. Ask right after the measurement."""
    return max(max(_loop() for _ in range(3)) / _USUAL, 1.0)


def _loop() -> float:
    began, total = time.process_time(), 0
    for number in range(300_000):
        total += number * number % 7
    return time.process_time() - began
