"""What a run does when machines, storage or the loss fail."""

from __future__ import annotations

from onerec_jax.config.section import Section, setting


class FaultsConfig(Section):
    """What a run does when machines, storage or the loss fail."""

    hang_factor: float = setting(
        20.0,
        "a step that takes this many times the median of the last 100 is a hang and ends the process, 0 = never",
        ge=0,
    )
    hang_least_s: float = setting(300.0, "seconds before which no step is a hang", gt=0)
    spike_factor: float = setting(
        3.0, "a log line whose loss is this many times the median of the last ten is a divergence, 0 = never", ge=0
    )
    rollbacks: int = setting(
        3, "times that a run goes back to its last checkpoint, past the data that it diverged on, before it stops", ge=0
    )
    bad_records: float = setting(
        0.0,
        "share of the users whose histories may be damaged: they are skipped and counted; more of them end the run",
        ge=0,
        lt=1,
    )
    metrics_port: int = setting(
        0,
        "serve the latest log line and the seconds by kind as Prometheus text on this loopback port, 0 = do not",
        ge=0,
        le=65535,
    )
