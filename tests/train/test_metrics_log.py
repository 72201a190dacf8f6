"""Log lines are whole, or not there."""

from __future__ import annotations

from pathlib import Path

from onerec_jax.train.metrics import MetricsLog, read_metrics


def test_a_log_line_cut_by_a_kill_is_neither_read_nor_joined_with_the_next(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.5}]
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write(2, {"loss": 2.25})
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 2.5), (2, 2.25)]
    path.write_text('{"step": 1, "lo')
    MetricsLog(tmp_path, tensorboard=False).close()
    assert read_metrics(tmp_path) == []
