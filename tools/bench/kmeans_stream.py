"""Peak memory of residual k-means that streams its vectors from a TensorStore on disk.

    python tools/bench/kmeans_stream.py [--rows 2000000] [--width 64] [--codes 256] [--levels 2] [--iterations 3]

The store is written first, by another process. Printed is the peak resident memory of the fitting process over what it
held once everything was imported and compiled, beside the size of the vectors.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

CHUNK = 65_536


def write_store(folder: str, rows: int, width: int) -> None:
    import tensorstore as ts

    store = ts.open(
        {"driver": "zarr", "kvstore": {"driver": "file", "path": folder}, "metadata": {"chunks": [CHUNK, width]}},
        create=True, dtype=ts.float32, shape=[rows, width],
    ).result()  # fmt: skip
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(1000, width)).astype(np.float32)
    for start in range(0, rows, CHUNK):
        size = min(CHUNK, rows - start)
        part = centres[rng.integers(0, len(centres), size)] + 0.7 * rng.normal(size=(size, width))
        store[start : start + size].write(part.astype(np.float32)).result()


def fit(folder: str, given: argparse.Namespace) -> None:
    import tensorstore as ts

    from onerec_jax.tokenizer import rq_kmeans
    from onerec_jax.tokenizer.quantizer import Items

    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": folder}}
    store = ts.open(spec, context=context, open=True).result()
    sizes = (given.codes,) * given.levels
    rq_kmeans.fit(Items(np.asarray(store[: 2 * given.codes]), sizes, iterations=1))
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    started = time.perf_counter()
    fitted = rq_kmeans.fit(Items(store, sizes, iterations=given.iterations))
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    size = given.rows * given.width * 4 / 2**30
    print(f"{given.rows:,} x {given.width} ({size:.2f} GiB), {given.levels} x {given.codes}: {seconds:.0f} s")
    print(f"peak {peak - base:.2f} GiB over a base of {base:.2f} GiB; codes {fitted.codes.nbytes / 2**30:.3f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"rows": 2_000_000, "width": 64, "codes": 256, "levels": 2, "iterations": 3}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "vectors")
        for target, arguments in ((write_store, (path, given.rows, given.width)), (fit, (path, given))):
            process = spawn.Process(target=target, args=arguments)
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
