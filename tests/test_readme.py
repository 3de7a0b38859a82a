"""The README is true: its Python and its commands run as printed, its tables are those of the results folders."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lqa.decoder import EMBEDDED_DECODER

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CARD = EMBEDDED_DECODER / "README.md"
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if re.match(r"python -m lqa (?!push )", line)]


def run(*argv: str) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("path", [ROOT / "README.md", CARD], ids=["README", "card"])
def test_python_blocks_run_as_printed(path):
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    blocks = [block for block in blocks if '"me/' not in block]  # with the Hub: test_round_trip.py
    assert blocks
    assert run("-c", "\n".join(blocks)).stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.split()[3])
def test_commands_run_as_printed(command):
    out = run(*shlex.split(command)[1:]).stdout
    if "--json" in command:
        document = json.loads(out)
        assert document["answers"][0]["answer"] and all(document["answers"][0]["grounding"].values())
    assert out.strip()


def test_targets_that_the_readme_names_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make (\w+)", README, re.MULTILINE)) | {"setup", "lint"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_tables_are_those_of_the_results_folders():
    from lqa.evals.report import MARKED, fill

    assert {match[2] for match in MARKED.finditer(README)} >= {"results/identify", "results/bench"}
    assert fill(README, ROOT) == README, "run `python -m lqa eval tables`"


def test_the_card_has_the_figures_of_its_results_folder(tmp_path):
    from lqa.config import DecoderConfig
    from lqa.evals.report import card_tables, metrics

    figures = DecoderConfig.load(EMBEDDED_DECODER).metrics
    folder = ROOT / "results" / figures["results"]
    assert metrics(folder) == figures, f"run `python -m lqa eval tables {folder.relative_to(ROOT)} --decoder {EMBEDDED_DECODER.name}`"
    assert card_tables(figures) in CARD.read_text(encoding="utf-8")
