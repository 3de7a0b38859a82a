"""The README's Hub section, word for word: pushed by its commands to a Hub on loopback, loaded in fresh processes with an empty cache."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer

from lqa import models
from lqa.cards import check_card
from lqa.decoder import EMBEDDED_DECODER

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## Publish")[2].partition("\n## ")[0]
PUSHES = re.findall(r"^(python -m lqa push .*)$", SECTION, re.MULTILINE)
(LOADING,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
READ = """
import json
import lqa
CHAT = [{"role": "system", "content": "You are a pirate captain."}, {"role": "user", "content": "Hello!"}]
def answers(decoder):
    answers = decoder.read(CHAT, span="user").ask(["Who is it?", "How will it speak?"], max_new_tokens=12)
    return [[a.text, a.confidence] for a in answers]
"""
# In one process, behind the README's own lines, which have made `decoder` and `data`: all of it is as in the folders.
SAME = """
import peft, torch
from safetensors.torch import load_file
ours = lqa.LatentDecoder.from_pretrained(base=decoder.base)
assert ours.name != decoder.name == "me/decoder" and answers(ours) == answers(decoder)
model = peft.PeftModel.from_pretrained(lqa.load_base().model, "me/decoder", torch_device="cpu")
loaded, folder = peft.get_peft_model_state_dict(model), load_file("decoders/smollm2-135m-instruct/adapter_model.safetensors")
assert set(loaded) == set(folder) and all(torch.equal(loaded[k], folder[k].to(loaded[k].dtype)) for k in folder)
for config in ("latentqa", "context", "facts"):
    theirs = data if config == "latentqa" else datasets.load_dataset("me/latentqa", config)
    assert {k: v.to_list() for k, v in datasets.load_dataset("dataset", config).items()} == {k: v.to_list() for k, v in theirs.items()}
print(json.dumps(answers(decoder)))
"""
OFFLINE = "print(json.dumps(answers(lqa.LatentDecoder.from_pretrained('me/decoder'))))"
CLONE = """
import sys
from huggingface_hub import snapshot_download
snapshot_download("me/demo", repo_type="space", local_dir=sys.argv[1])
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub that the README's pushes have gone to."""
    with HubServer() as server:
        for command in PUSHES:
            run(server, tmp_path_factory.mktemp("home"), *shlex.split(command)[1:])
        yield server


def run(hub, home, *argv, cwd=ROOT, **more) -> str:
    """Runs Python in a process of its own, as a user would: HF_ENDPOINT says where the Hub is, `home` has all caches but the base's."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "PYTHONPATH")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "hf_write", "LQA_CACHE": str(models.cache_folder())} | more
    done = subprocess.run([sys.executable, *argv], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_section_names_every_kind_that_there_is_something_of():
    kinds = {"dataset", "decoder", "space"} | ({"steering"} if (ROOT / "steerings").is_dir() else set())
    assert {command.split()[4] for command in PUSHES} == kinds and len(PUSHES) == len(kinds)


@pytest.mark.slow
def test_every_repository_is_one_complete_commit_with_a_valid_card(hub):
    assert set(hub.repos) >= {("dataset", "me/latentqa"), ("model", "me/decoder"), ("space", "me/demo")}
    assert len(hub.repos) == len(PUSHES)
    for (kind, _), repo in hub.repos.items():
        assert len(repo.commits) == 2 and set(repo.commits[0].files) == {".gitattributes"}
        check_card(repo.commits[-1].files["README.md"].content.decode(), kind)


@pytest.mark.slow
def test_every_number_of_the_decoder_s_card_is_in_the_results_folder(hub):
    files = hub.repos["model", "me/decoder"].commits[-1].files
    text = (ROOT / "results/identify/identify.json").read_text(encoding="utf-8")
    assert files["results/identify.json"].content.decode() == text
    tables = json.loads(text)["tables"]
    card = files["README.md"].content.decode()
    data = yaml.safe_load(card.split("---\n")[1])
    assert data["datasets"] == ["me/latentqa"]
    values = [result["metrics"][0]["value"] for result in data["model-index"][0]["results"]]
    assert values == [round(tables[part]["rows"]["ours"][0]["mean"], 4) for part in ("fixed", "own")]
    printed = re.findall(r"^\| (\w+) \| ([\d.]+)% \(([\d.]+) to ([\d.]+)\)(?: \|.*)? \| (\d+) \|$", card, re.MULTILINE)
    cells = [(name, cells[0]) for key, table in tables.items() if not key.startswith("sweep") for name, cells in table["rows"].items()]
    assert printed == [(name, *(f"{100 * c[key]:.1f}" for key in ("mean", "low", "high")), str(c["n"])) for name, c in cells]


@pytest.mark.slow
def test_what_is_loaded_as_the_readme_says_is_what_was_pushed_and_loads_offline_too(hub, tmp_path):
    """Decoder, adapter in PEFT's eyes, and rows of the dataset."""
    lines = run(hub, tmp_path, "-c", READ + LOADING + SAME).strip().splitlines()
    assert len(lines) == 2 and len(json.loads(lines[-1])) == 2  # what the README prints, then ours
    requests = len(hub.requests)
    assert json.loads(run(hub, tmp_path, "-c", READ + OFFLINE, HF_HUB_OFFLINE="1")) == json.loads(lines[-1])
    assert len(hub.requests) == requests


@pytest.mark.slow
def test_a_clone_of_the_space_starts(hub, tmp_path):
    run(hub, tmp_path / "home", "-c", CLONE, str(tmp_path / "demo"))
    names = {p.relative_to(tmp_path / "demo").as_posix() for p in (tmp_path / "demo").rglob("*") if p.is_file()}
    names = {name for name in names if not name.startswith(".cache/")}
    assert {"README.md", "app.py", "requirements.txt", "lqa/ui/static/page.css", "lqa/corpus/questions.yaml"} <= names
    assert not [n for n in names if n.split("/")[0] in ("tests", "train", "results", "dataset", ".git", ".venv") or n.endswith(".pyc")]
    out = run(hub, tmp_path / "home", "app.py", "--check", cwd=tmp_path / "demo")
    assert "Who is the assistant pretending to be?" in out and len(out.strip().splitlines()) == 2


def test_the_front_matter_preloads_the_file_that_is_loaded():
    data = yaml.safe_load(README.split("---\n")[1])
    assert data["preload_from_hub"] == [f"{models.GGUF_REPO} {models.GGUF_FILE} {models.GGUF_REVISION}"]
    assert data["models"] == [models.GGUF_REPO] and (ROOT / data["app_file"]).is_file() and EMBEDDED_DECODER.is_dir()
    assert f"gradio[mcp]=={data['sdk_version']} " in (ROOT / "requirements.txt").read_text()
    assert isinstance(data["python_version"], str) and len(data["short_description"]) <= 60


def test_a_preloaded_file_is_found_offline_where_the_package_is_absent(tmp_path):
    """As in a Space: what `preload_from_hub` names is put into the client's cache; then the embedded model's file comes from there."""
    preload, find = f"""
from huggingface_hub import hf_hub_download
repo, name, sha = {yaml.safe_load(README.split("---" + chr(10))[1])["preload_from_hub"][0]!r}.split()
hf_hub_download(repo, name, revision=sha)
""", """
import importlib.util
from lqa import models
importlib.util.find_spec = lambda name: None
print(models.find_gguf().read_bytes().decode())
"""
    with HubServer() as server:
        repo = server.add("model", models.GGUF_REPO, {models.GGUF_FILE: b"the weights"})
        repo.commits[0].sha = models.GGUF_REVISION
        run(server, tmp_path, "-c", preload)
        assert run(server, tmp_path, "-c", find, HF_HUB_OFFLINE="1").strip() == "the weights"
