"""Which code made a result."""

from __future__ import annotations

import subprocess
from pathlib import Path

import lqa


def code_version() -> str:
    """The git commit of this checkout, with "+dirty" if tracked files differ from it; the package's version outside of one."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != Path(__file__).parent.parent.resolve():
            return lqa.__version__  # installed inside another project's checkout
        return git("rev-parse", "--short=12", "HEAD") + ("+dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return lqa.__version__
