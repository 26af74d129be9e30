"""What the benchmark commands share: choosing cases by pattern, running each in a process of its own, writing bytes."""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any


def select(names: Iterable[str], patterns: Sequence[str] | None) -> list[str]:
    """The names that match a pattern (all without one), in their order; ends the program if there is none."""
    names = list(names)
    found = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns or ["*"])]
    if not found:
        sys.exit(f"nothing has that name; there are {', '.join(names)}")
    return found


def run_worker(
    command: Sequence[str], timeout: float, environment: Mapping[str, str] = MappingProxyType({})
) -> tuple[Any, str]:
    """What the last line that `command` prints says in JSON, and what it printed before; None and the reason where it
    fails. The `environment` is added to this process's own."""
    settings: dict[str, Any] = {"capture_output": True, "text": True, "env": {**os.environ, **environment}}
    try:
        done = subprocess.run([sys.executable, *command], timeout=timeout, **settings)
    except subprocess.TimeoutExpired:
        return None, f"took more than {timeout:g} s"
    if done.returncode != 0:
        sys.stderr.write(done.stderr)
        return None, last_line(done.stderr) or f"exit status {done.returncode}"
    *before, last = done.stdout.splitlines()
    return json.loads(last), "\n".join(before)


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def mebibytes(n: int | None) -> str:
    return "" if n is None else f"{n / 2**20:.1f}"
