"""The page on ZeroGPU: every decorated handler through the real `spaces` wrappers, in worker processes, emulated on CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("spaces", reason="the page needs the extra 'ui'")

MOST = 60  # seconds of GPU that a handler may ask for: an anonymous visitor has two minutes a day


@pytest.mark.slow
def test_handlers_through_the_real_wrappers(decoder_folder):
    worker = Path(__file__).parent / "zerogpu_worker.py"
    command = [sys.executable, str(worker), str(decoder_folder())]
    done = subprocess.run(command, cwd=worker.parents[1], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report) == {"ask", "follow_up", "reply", "scan", "watch", "read", "score", "error", "train", "compare"}
    for name, entry in report.items():
        # Workers compute the same, and everything crossed the process boundary.
        assert entry["wrapped"] == entry["plain"], name
        assert entry["seconds"] and all(0 < seconds <= MOST for seconds in entry["seconds"]), (name, entry["seconds"])
    assert "There is no question" in report["error"]["wrapped"][2]
    assert report["ask"]["seconds"][0] > report["follow_up"]["seconds"][0] - 5  # more questions, more time
