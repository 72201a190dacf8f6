"""Run folders on a disk, or in a bucket: `runs`, `gs://bucket/runs`, `s3://bucket/runs`.

A folder on a disk is a `pathlib.Path`; one in a bucket is an `etils.epath.Path`, which has its methods, over gcsfs or s3fs.
Orbax and TensorStore write arrays to a bucket by themselves, each process its own. A bucket has no renames and nothing can be
appended to: an object is there as a whole or not at all, and a file that grows is written anew.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import posixpath
import sys
import threading
from pathlib import Path
from typing import Any, cast

import fsspec
import fsspec.config
from etils import epath

from onerec_jax.errors import InputError, StorageError

DRIVERS = {"gs": "gcsfs", "s3": "s3fs"}
EXTRAS = {"gs": "gcs", "s3": "s3"}

COMMITTED = "commit_success.txt"  # what Orbax writes last into a checkpoint where it cannot rename
ATTEMPTS = 30  # of a request to S3, with pauses of up to 20 s: some minutes
ROUNDS = 10  # of gcsfs's attempts of a request to Google, half a minute each


def folder(name: str | Path) -> Path:
    """A folder by its path or URL; nothing is read.

    Raises:
        InputError: a URL of another kind, or the package that reads this kind is not installed.
    """
    scheme, separator, _ = os.fspath(name).partition("://")
    if not separator:
        return Path(name)
    if scheme not in DRIVERS:
        raise InputError(f"{name}: {scheme}:// is unknown; a folder is a path, gs://BUCKET/PATH or s3://BUCKET/PATH")
    _prepare(scheme)
    return cast(Path, epath.Path(os.fspath(name)))


def is_remote(path: Path | str) -> bool:
    return "://" in os.fspath(path)


def reach(path: Path) -> None:
    """Asks a bucket for something, so that what is wrong is said before anything is done; a disk is not asked.

    Raises:
        InputError: there is no such bucket, or it may not be read.
        StorageError: it does not answer.
    """
    if not is_remote(path):
        return
    system, at = fsspec.url_to_fs(os.fspath(path))
    try:
        system.ls(at)
    except FileNotFoundError:
        _reach_bucket(path, system, at.partition("/")[0])
    except Exception as error:  # every driver has its own
        raise _unreachable(path, error) from error


def _reach_bucket(path: Path, system: Any, bucket: str) -> None:
    try:
        system.ls(bucket)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no bucket {bucket}") from None
    except PermissionError:  # to list all of it; what lies below `path` it may
        return
    except Exception as error:
        raise _unreachable(path, error) from error


def _unreachable(path: Path, error: Exception) -> Exception:
    reason = f"{path} cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        return InputError(f"{reason}; the process needs credentials that may read and write there")
    return StorageError(reason)


def write_text(path: Path, text: str) -> None:
    """A file, whole or not at all."""
    if is_remote(path):
        path.write_text(text)
        return
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def joined(path: Path, relative: str) -> Path:
    """`path / relative` without `..`, or `relative` itself if it is no relative path."""
    if is_remote(relative) or os.path.isabs(relative):
        return folder(relative)
    scheme, separator, rest = os.fspath(path).rpartition("://")
    return folder(scheme + separator + posixpath.normpath(posixpath.join(rest, relative)))


def relative(path: Path, start: Path) -> str:
    """What `joined` makes `path` of, beginning at `start`: it stays true when both are moved."""
    if is_remote(path) != is_remote(start):
        return os.fspath(path) if is_remote(path) else str(path.resolve())
    return os.path.relpath(path, start)


def move(path: Path, to: Path) -> None:
    """Gives a folder another name; in a bucket by copying it."""
    if is_remote(path):
        system, at = fsspec.url_to_fs(os.fspath(path))
        target = fsspec.url_to_fs(os.fspath(to))[1]
        for name in system.find(at):  # fsspec's own `mv` also copies folders, which are no objects
            system.cp_file(name, target + name.removeprefix(at))
        system.rm(at, recursive=True)
        return
    to.parent.mkdir(exist_ok=True)
    path.rename(to)


def upload(source: Path, to: Path) -> None:
    """Copies a folder of this machine into a bucket."""
    system, at = fsspec.url_to_fs(os.fspath(to))
    system.put(f"{source}/", f"{at}/", recursive=True)


def listing(path: Path) -> dict[str, tuple[int, str]]:
    """Size and checksum of every object under a folder of a bucket, as the bucket itself says, by relative name."""
    system, at = fsspec.url_to_fs(os.fspath(path))
    found = {}
    for name, about in system.find(at, detail=True).items():
        checksum = about.get("crc32c") or about.get("ETag") or ""
        found[name.removeprefix(f"{at}/")] = (int(about["size"]), str(checksum))
    return found


class Growing:
    """The lines of an object in a bucket. A thread writes it anew as soon as there are more; `close` waits for it."""

    def __init__(self, path: Path):
        self._path, self._lost = path, False
        self._content = path.read_bytes() if path.exists() else b""
        self._more = threading.Condition()
        self._pending = self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"upload {path.name}", daemon=True)
        self._thread.start()

    def append(self, line: bytes) -> None:
        with self._more:
            self._content += line
            self._pending = True
            self._more.notify()

    def close(self) -> None:
        with self._more:
            self._closed = True
            self._more.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._more:
                self._more.wait_for(lambda: self._pending or self._closed)
                if not self._pending:
                    return
                content, self._pending = self._content, False
            try:
                self._path.write_bytes(content)
                self._lost = False
            except Exception as error:
                if not self._lost:
                    reason = " ".join(str(error).split())
                    print(
                        f"warning: {self._path} could not be written, the next line tries again: {reason}",
                        file=sys.stderr,
                    )
                self._lost = True


@functools.cache
def _prepare(scheme: str) -> None:
    try:
        importlib.import_module(DRIVERS[scheme])
    except ImportError:
        raise InputError(
            f"{scheme}:// needs the package {DRIVERS[scheme]}: pip install 'onerec_jax[{EXTRAS[scheme]}]'"
        ) from None
    settings = fsspec.config.conf.setdefault(scheme, {})
    settings.setdefault("use_listings_cache", False)  # TensorStore writes to the same places
    if scheme == "s3":
        retries = {"max_attempts": ATTEMPTS, "mode": "standard"}
        settings.setdefault("config_kwargs", {"retries": retries})
        _teach_orbax_s3()
    else:
        _make_gcsfs_patient()


def _make_gcsfs_patient() -> None:
    """gcsfs gives a request up after half a minute, and takes no other number: here it then begins again."""
    import gcsfs
    from gcsfs.retry import is_retriable

    class Patient(gcsfs.GCSFileSystem):
        async def _request(self, *args: Any, **kwargs: Any) -> Any:
            for _ in range(ROUNDS - 1):
                try:
                    return await super()._request(*args, **kwargs)
                except Exception as error:
                    if not is_retriable(error):
                        raise
            return await super()._request(*args, **kwargs)

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it says that it gives up
    for protocol in ("gs", "gcs"):
        fsspec.register_implementation(protocol, Patient, clobber=True)


def _teach_orbax_s3() -> None:
    """Orbax writes to gs:// by itself, and to s3:// once it is told TensorStore's name of a place there.

    Everything else that it does in a bucket goes through `epath`, and is the same in both.
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    in_gcs, place_in_gcs, normal = (
        gcs_utils.is_gcs_path, gcs_utils.get_kvstore_for_gcs, tensorstore_utils._normalize_path
    )  # fmt: skip

    def is_in_bucket(path: Any) -> bool:
        return os.fspath(path).startswith("s3://") or in_gcs(path)

    def place(path: str) -> dict[str, Any]:
        return s3_place(path) if path.startswith("s3://") else place_in_gcs(path)

    gcs_utils.is_gcs_path = is_in_bucket
    gcs_utils.get_kvstore_for_gcs = place
    tensorstore_utils._use_gcs_driver = lambda directory: directory.startswith(("gs://", "s3://"))
    tensorstore_utils._normalize_path = lambda path: normal(path).replace("s3:/", "s3://")


def s3_place(path: str) -> dict[str, Any]:
    """TensorStore's spec of a place in S3, or in what `AWS_ENDPOINT_URL` names."""
    bucket, _, key = path.removeprefix("s3://").partition("/")
    place: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": key}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        place |= {"endpoint": endpoint, "aws_region": region}
    if (
        "AWS_ACCESS_KEY_ID" in os.environ
    ):  # else it looks for them in many places, and complains of each that is not there
        place["aws_credentials"] = {"type": "environment"}
    return place
