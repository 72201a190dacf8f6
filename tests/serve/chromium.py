"""A page as headless Chromium shows it. Needs root to install Debian's `chromium` where it is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
PATIENCE_MS = 20_000  # of the page's own clock, which stands still while it waits for the server


class Unavailable(RuntimeError):
    """Chromium cannot be had here; says why."""


def install() -> None:
    """Installs Chromium if it is missing.

    Raises:
        Unavailable: not root, or no package.
    """
    if shutil.which("chromium"):
        return
    if os.geteuid():
        raise Unavailable("chromium is missing, and installing it needs root")
    for words in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        command = ["apt-get", "--quiet", *words]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        except OSError as error:
            raise Unavailable(f"chromium is missing, and there is no apt-get: {error}") from None
        if done.returncode:
            raise Unavailable(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())[-500:]}")


def elements(address: str, folder: Path, size: str = "1200,900") -> str:
    """The page's HTML once its scripts have come to rest."""
    command = [
        "chromium", *FLAGS, f"--user-data-dir={folder}", f"--window-size={size}", f"--virtual-time-budget={PATIENCE_MS}",
        "--dump-dom", address,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def texts(html: str, name: str) -> list[str]:
    """The text of every element of one class, which holds nothing but text."""
    return [unescape(text) for text in re.findall(rf'class="{name}"[^>]*>([^<]*)<', html)]


def part(html: str, identity: str) -> str:
    """The inside of a list."""
    found = re.search(rf'<ol [^>]*id="{identity}"[^>]*>(.*?)</ol>', html, re.S)
    assert found is not None, f"no list {identity} in the page"
    return found[1]
