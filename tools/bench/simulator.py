"""Events per second of the simulator's stream, on one core.

    python tools/bench/simulator.py [--events 1000000] [--runs 3]

Prints per size the median over runs and its range, by wall time and by CPU time (the same on a machine that does
nothing else); building the platform (catalogue, calibration) is timed apart.
"""

from __future__ import annotations

import argparse
import statistics
import time

from onerec_jax.config import SimulatorSource
from onerec_jax.data.sources.simulator import make_platform, stream

SIZES = (
    SimulatorSource(),
    SimulatorSource(users=20_000, items=5_000),
    SimulatorSource(users=20_000, items=100_000, topics=96),
    SimulatorSource(users=20_000, items=1_000_000, topics=96),
    SimulatorSource(users=2_000, items=20_000, events_per_user=1_000.0),
)


def timed(source: SimulatorSource, events: int) -> tuple[float, float, float]:
    """(seconds to build the platform, then events per second and per second of CPU)."""
    start = time.perf_counter()
    platform = make_platform(source, seed=0)
    built, used = time.perf_counter(), time.process_time()
    rows = sum(len(chunk["user_id"]) for chunk in stream(source, 0, events, 65_536, platform))
    assert rows == events
    return built - start, events / (time.perf_counter() - built), events / (time.process_time() - used)


def main() -> None:
    parser = argparse.ArgumentParser(description="events per second of the simulator")
    parser.add_argument("--events", type=int, default=1_000_000, help="events per run")
    parser.add_argument("--runs", type=int, default=3, help="runs per size")
    arguments = parser.parse_args()
    print(f"{'users':>8} {'items':>9} {'each':>6} {'build s':>8} {'events/s':>10} {'range':>20} {'events/CPU s':>13}")
    for source in SIZES:
        runs = [timed(source, arguments.events) for _ in range(arguments.runs)]
        build = statistics.median(seconds for seconds, _, _ in runs)
        rates = sorted(rate for _, rate, _ in runs)
        print(
            f"{source.users:8,} {source.items:9,} {source.events_per_user:6,.0f} {build:8.2f} "
            f"{statistics.median(rates):10,.0f} {f'{rates[0]:,.0f} - {rates[-1]:,.0f}':>20} "
            f"{statistics.median(rate for _, _, rate in runs):13,.0f}"
        )


if __name__ == "__main__":
    main()
