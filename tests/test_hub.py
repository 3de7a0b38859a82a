"""Publishing and loading through the client, against a Hub on loopback: one commit or none, every failure one sentence, valid cards."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hub_server import Cut
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file

from lqa import LatentDecoder, LqaError
from lqa import hub as publishing
from lqa.cards import check_card, write_decoder_card
from lqa.cli import main
from lqa.config import DecoderConfig
from lqa.download import STEERING_FILES, download
from lqa.models import load_base
from train import export

CHAT = [{"role": "system", "content": "Speak like a pirate."}, {"role": "user", "content": "Who is it in the city?"}]
QUESTION = "How will the assistant speak?"
MIXTURE = {"name": "test corpus", "revision": "0" * 16, "mixture": {"pool": 0.7, "none": 0.05}}
TRAINING = {"steps": 20, "readings": 1080, "qa_pairs": 3240, "learning_rate": 6e-4, "seed": 0, "code": "0123456789ab", "last_loss": 3.0}
LOG = [
    {"step": 10, "loss": 4.5, "grad_norm": 1.0},
    {"step": 10, "eval_true_loss": 4.1, "eval_true_runtime": 3.0},
    {"step": 10, "eval_shuffled_loss": 4.3},
    {"step": 20, "loss": 3.5},
]
OURS, NONE = {"mean": 0.3125, "low": 0.25, "high": 0.375, "n": 280}, {"mean": 0.125, "low": 0.125, "high": 0.125, "n": 280}
TABLE = {"title": "One message", "columns": {"accuracy": "%"}, "rows": {"ours": [OURS], "none": [NONE]}, "note": "Chance 12.5%."}
RESULTS = {
    "provenance": {"decoder": {"name": "x"}, "code": "0", "seconds": 1, "command": "python -m lqa eval identify --data DATA"},
    "data": {"name": "some labels", "sha256": "0"},
    "tables": {"fixed": TABLE, "own": TABLE | {"title": "Own message"}, "sweep-layer": TABLE | {"title": "By layer"}},
    "items": [],
    "plots": [],
    "settings": {},
}


@pytest.fixture
def run(decoder_folder):
    """A finished training run of a tiny decoder."""
    folder = decoder_folder("smol", corpus=MIXTURE, training=TRAINING)
    name_base(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    return folder


def name_base(folder, name="tiny/smol"):
    """As training does: the adapter names the base's id, not where the weights were."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))


@pytest.fixture
def results(tmp_path, run):
    """A results folder of that decoder."""
    base = DecoderConfig.load(run).base
    made_by = {"model": base, "decoder": {"name": "tiny", "training": TRAINING}}
    (tmp_path / "identify").mkdir()
    (tmp_path / "identify/identify.json").write_text(json.dumps(RESULTS | {"provenance": RESULTS["provenance"] | made_by}))
    return tmp_path / "identify"


@pytest.fixture
def folder(run, tmp_path):
    """A decoder folder, ready to be pushed."""
    export.export(run, tmp_path / "tiny-decoder")
    return tmp_path / "tiny-decoder"


def answers(decoder):
    return [a.text for a in decoder.read(CHAT, "user").ask([QUESTION, "Who is it?"], max_new_tokens=6)]


def load(tiny, source="me/decoder", family="smol", **options):
    return LatentDecoder.from_pretrained(source, base=tiny(family), **options)


# --- cards -------------------------------------------------------------------------------------------------------


def test_card_is_valid_and_every_number_comes_from_the_files(run, results, tmp_path):
    out = tmp_path / "tiny-decoder"
    export.export(run, out, results)
    card = ModelCard.load(out / "README.md")
    check_card(str(card), "model")
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0" and data["library_name"] == "peft" and data["base_model"] == "tiny/smol"
    assert data["base_model_relation"] == "adapter" and data["pipeline_tag"] == "text-generation" and "latentqa" in data["tags"]
    (first, second) = data["model-index"][0]["results"]
    assert first["metrics"][0]["value"] == 0.3125 and "fixed" in first["dataset"]["name"] and "own" in second["dataset"]["name"]
    text = card.text
    figures = ("| ours | 31.2% (25.0 to 37.5) | 280 |", "12.5% (12.5 to 12.5)", "Own message", "some labels", "4.100", "4.300")
    for expected in (*figures, "1,080 readings", "3,240 question-answer pairs", "![Loss"):
        assert expected in text, expected
    for leftover in ("{{", "{%", "More Information Needed", "None", "By layer", "<built-in", str(tmp_path)):
        assert leftover not in text, leftover


def test_the_figures_of_a_folder_are_put_into_a_decoder_by_a_command(run, results, capsys):
    assert main(["eval", "tables", str(results), "--decoder", str(run)]) == 0
    assert str(run / "README.md") in capsys.readouterr().out
    assert DecoderConfig.load(run).metrics["identify"]["tables"] == {k: t for k, t in RESULTS["tables"].items() if k != "sweep-layer"}
    assert "31.2% (25.0 to 37.5)" in (run / "README.md").read_text()


def test_the_card_of_a_reference_or_fake_says_what_it_is(decoder_folder):
    text = decoder_folder("smol", injection="visible_text", injection_constant=None, corpus=MIXTURE, training=TRAINING)
    assert "reads no activations" in write_decoder_card(text).read_text()
    mixture = MIXTURE | {"mixture": MIXTURE["mixture"] | {"shuffled_activations": True}}
    for how, words in (
        ({"conditioning": "centred"}, "minus the mean of its layer"),
        ({"conditioning": "projected"}, "fitted by ridge regression on the training controls before the LoRA was trained) to what"),
        ({"conditioning": "projected", "fit": {"start": "fitted", "train": True}}, "was trained, then trained with it) to what"),
        ({"conditioning": "projected", "fit": {"start": "identity", "train": True}}, "started at the identity and trained with the LoRA)"),
    ):
        training = TRAINING | {"projection": how.pop("fit", {})}
        assert words in write_decoder_card(decoder_folder("smol", training=training, **how)).read_text()
    assert "A fake" in write_decoder_card(decoder_folder("smol", corpus=mixture, training=TRAINING)).read_text()


def test_card_without_metrics_says_so(run):
    write_decoder_card(run)
    card = ModelCard.load(run / "README.md")
    assert "Not evaluated yet" in card.text and "model-index" not in card.data.to_dict()


def test_results_of_another_decoder_are_refused(folder, results):
    data = json.loads((results / "identify.json").read_text())
    data["provenance"]["decoder"]["training"]["steps"] = 21
    (results / "identify.json").write_text(json.dumps(data))
    with pytest.raises(LqaError, match="results of another decoder"):
        publishing.prepare("decoder", folder, "me/decoder", results=str(results))
    with pytest.raises(LqaError, match="holds no results of a suite"):
        publishing.prepare("decoder", folder, "me/decoder", results=str(folder))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.replace("license: apache-2.0\n", ""), "lacks license"),
        (lambda t: t + "\n[More Information Needed]", "More Information Needed"),
        (lambda t: t.replace("base_model: tiny/smol", "base_model: /home/x/llama"), "no Hub id"),
        (lambda t: t.replace("base_model: tiny/smol", "base_model: tests"), "folder of this machine"),
        (lambda t: t.replace("tags:", "tags: ]"), "not valid"),
    ],
)
def test_cards_that_are_not_right_are_refused_offline(change, words, folder):
    with pytest.raises(LqaError, match=words):
        check_card(change((folder / "README.md").read_text()), "model")


# --- exporting a run ---------------------------------------------------------------------------------------------


def test_export_is_16_bit_complete_and_loads(run, tmp_path, tiny):
    out = tmp_path / "out"
    export.export(run, out)
    assert {p.name for p in out.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "lqa_config.json", "training_log.json", "loss.png", "README.md"
    }  # fmt: skip
    full, half = load_file(run / "adapter_model.safetensors"), load_file(out / "adapter_model.safetensors")
    assert all(half[k].dtype == torch.float16 and torch.equal(half[k], full[k].to(torch.float16)) for k in full)
    assert DecoderConfig.load(out).training == TRAINING
    assert [e.get("loss") for e in json.loads((out / "training_log.json").read_text())] == [4.5, None, None, 3.5]
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    export.export(run, out)
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}  # the same run gives the same bytes
    assert LatentDecoder.from_pretrained(out, base=tiny("smol"))


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(LqaError, match="not a finished training run"):
        export.export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export.main([str(tmp_path), str(tmp_path / "out")]) == 2


# --- pushing and loading -----------------------------------------------------------------------------------------


def test_a_pushed_decoder_answers_as_the_folder_does(hub, folder, results, tiny, monkeypatch):
    pushed = publishing.push("decoder", folder, "me/decoder", results=str(results), dataset="me/latentqa")
    (empty, commit) = hub.repos["model", "me/decoder"].commits
    assert (pushed.url, pushed.commit, pushed.changed) == (f"{hub.url}/me/decoder", commit.sha, True)
    assert set(commit.files) == {".gitattributes", "README.md", "results/identify.json"} | {p.name for p in folder.iterdir()}
    assert set(empty.files) == {".gitattributes"}
    card = ModelCard(commit.files["README.md"].content.decode())
    assert card.data.datasets == ["me/latentqa"] and card.data.eval_results[0].metric_value == 0.3125
    assert 'from_pretrained("me/decoder")' in card.text and "`results/`" in card.text

    expected = answers(load(tiny, folder))
    assert answers(load(tiny)) == expected
    wanted = {"adapter_model.safetensors", "adapter_config.json", "lqa_config.json"}
    assert {p.name for p in Path(constants.HF_HUB_CACHE).glob("models--me--decoder/snapshots/*/*")} == wanted  # and nothing else

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert answers(load(tiny)) == expected and len(hub.requests) == before


def test_what_has_not_changed_is_not_pushed_again(hub, folder):
    first = publishing.push("decoder", folder, "me/decoder")
    before = len(hub.requests)
    second = publishing.push("decoder", folder, "me/decoder")
    assert (second.commit, second.changed) == (first.commit, False) and len(hub.repos["model", "me/decoder"].commits) == 2
    assert not [path for method, path in hub.requests[before:] if method == "PUT" or "/commit/" in path]


def test_a_changed_file_is_one_more_commit_and_what_is_gone_goes(hub, folder, tiny):
    publishing.push("decoder", folder, "me/decoder")
    repo = hub.repos["model", "me/decoder"]
    repo.commit("by hand", repo.commits[-1].files | {"notes.txt": repo.commits[0].files[".gitattributes"]})
    (folder / "loss.png").unlink()
    pushed = publishing.push("decoder", folder, "me/decoder")
    assert pushed.changed and len(repo.commits) == 4
    files = repo.commits[-1].files
    assert "loss.png" not in files and "notes.txt" in files and b"![Loss" not in files["README.md"].content


def test_a_revision_is_the_state_of_that_commit(hub, folder, tiny):
    first = publishing.push("decoder", folder, "me/decoder").commit
    old = answers(load(tiny))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: t * 5 for k, t in tensors.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    publishing.push("decoder", folder, "me/decoder")
    assert answers(load(tiny, revision=first)) == old != answers(load(tiny))


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_private_is_kept(kind, hub, folder, tmp_path):
    path = {"model": folder, "dataset": Path(__file__).parent.parent / "dataset", "space": Path(__file__).parent.parent}[kind]
    name = "decoder" if kind == "model" else kind
    publishing.push(name, path, "me/secret", private=True)
    repo = hub.repos[kind, "me/secret"]
    assert repo.private and (repo.body.get("hardware"), repo.body.get("sdk")) == (
        ("zero-a10g", "gradio") if kind == "space" else (None, None)
    )
    repo.private = False
    with pytest.raises(LqaError, match="me/secret exists and is public"):
        publishing.push(name, path, "me/secret", private=True)


def test_a_steering_is_pushed_like_a_decoder(hub, folder):
    sidecar = {"schema_version": 1, "base": {"name": "tiny/smol"}, "control": "Speak like a pirate.", "qa": [["Who is it?", "A pirate."]]}
    sidecar |= {"decoder": "x", "settings": {"method": "joint", "layers": [0, 1]}, "steps": 12}
    (folder / publishing.STEERING_SIDECAR).write_text(json.dumps(sidecar))
    publishing.push("steering", folder, "me/pirate")
    files = hub.repos["model", "me/pirate"].commits[-1].files
    assert set(files) == {".gitattributes", "README.md", "adapter_model.safetensors", "adapter_config.json", publishing.STEERING_SIDECAR}
    card = files["README.md"].content.decode()
    figures = ("| steps | 12 |", "| method | joint |", "*Who is it?* A pirate.")
    for expected in ('.load_steering("me/pirate")', "> Speak like a pirate.", *figures):
        assert expected in card, expected
    fetched = download("me/pirate", STEERING_FILES, what="steering")
    assert {p.name for p in fetched.iterdir()} == set(STEERING_FILES)
    assert (fetched / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()


def test_a_pushed_steering_loads_as_its_folder_does(hub, folder, tiny, tmp_path):
    decoder = load(tiny, folder)
    made = decoder.steer(qa=[("Who is it?", "A pirate.")], steps=2, batch=1, chats=2, held_out=1, evaluate=1, rank=2)
    made.save(tmp_path / "pirate")
    publishing.push("steering", tmp_path / "pirate", "me/pirate")
    theirs, ours = decoder.load_steering("me/pirate"), decoder.load_steering(tmp_path / "pirate")
    assert theirs.record == ours.record and str(tmp_path) not in json.dumps(theirs.record)
    one, two = (list(decoder.base.adapter_parameters(s.adapter).values()) for s in (theirs, ours))
    assert len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    with pytest.raises(LqaError, match="steering 'me/nothing' is neither a folder here nor a repository"):
        decoder.load_steering("me/nothing")
    with pytest.raises(LqaError, match="no revision 'v9'"):
        decoder.load_steering("me/pirate", revision="v9")


# --- uploads that break off --------------------------------------------------------------------------------------


def weights_url(folder) -> str:
    return f"/lfs/{hashlib.sha256((folder / 'adapter_model.safetensors').read_bytes()).hexdigest()}"


def test_a_connection_that_breaks_once_is_tried_again(hub, folder):
    cut = []

    def fault(method, path, so_far, total):
        if path == weights_url(folder) and not cut:
            cut.append(path)
            raise Cut

    hub.fault = fault
    assert publishing.push("decoder", folder, "me/decoder").changed
    assert hub.requests.count(("PUT", weights_url(folder))) == 2 and len(hub.repos["model", "me/decoder"].commits) == 2


@pytest.mark.slow
def test_a_push_killed_in_the_middle_leaves_no_half_and_is_simply_repeated(hub, folder):
    """The process dies while the weights are on their way; another file has arrived by then."""

    def fault(method, path, so_far, total):
        if path == weights_url(folder):
            if not hub.blobs:  # the plot is sent at the same time and comes first
                return False
            child.kill()
            raise Cut

    hub.fault = fault
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(folder.parent / "home")}
    argv = [sys.executable, "-m", "lqa", "push", "decoder", str(folder), "me/decoder"]
    child = subprocess.Popen(argv, cwd=Path(__file__).parent.parent, env=environment, stderr=subprocess.DEVNULL)
    assert child.wait(120) != 0
    repo = hub.repos["model", "me/decoder"]
    assert [set(c.files) for c in repo.commits] == [{".gitattributes"}]  # nothing to be seen

    hub.fault, before = None, len(hub.requests)
    publishing.push("decoder", folder, "me/decoder")
    assert [len(c.files) for c in repo.commits] == [1, 7]
    assert [path for method, path in hub.requests[before:] if method == "PUT"] == [weights_url(folder)]  # the plot is not sent twice


def test_an_upload_that_fails_is_one_sentence_and_no_commit(hub, folder, monkeypatch):
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # the client's pauses between its attempts

    def fault(method, path, so_far, total):
        raise Cut

    hub.fault = fault
    with pytest.raises(LqaError, match="connection to the Hub broke off and me/decoder is as it was; push again"):
        publishing.push("decoder", folder, "me/decoder")
    assert len(hub.repos["model", "me/decoder"].commits) == 1


def test_two_pushes_at_once_do_not_mix(hub, folder):
    repo = hub.add("model", "me/decoder", {"README.md": b"other"})

    def fault(method, path, so_far, total):
        if len(repo.commits) == 1:
            repo.commit("somebody else's", repo.commits[-1].files)

    hub.fault = fault
    with pytest.raises(LqaError, match="changed by somebody else.*push again"):
        publishing.push("decoder", folder, "me/decoder")
    assert set(repo.commits[-1].files) == {"README.md"}
    assert publishing.push("decoder", folder, "me/decoder").changed


# --- what cannot be pushed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "repo_id", "words"),
    [
        (None, "me/decoder", "no Hub token.*hf auth login"),
        ("hf_read", "me/decoder", "may only read"),
        ("hf_expired", "me/decoder", "does not accept the token"),
        ("hf_write", "them/decoder", "may not write to them/decoder"),
        ("hf_write", "decoder", "not a Hub id; write it as owner/name"),
    ],
)
def test_who_may_not_push_is_told_so(token, repo_id, words, hub, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(LqaError, match=words) as error:
        publishing.push("decoder", folder, repo_id)
    assert "\n" not in str(error.value) and not hub.repos


def test_the_hub_s_own_rules_come_before_anything_is_sent(hub, folder, monkeypatch):
    monkeypatch.setattr("hub_server.card_errors", lambda kind, content: ['"license" is not one of ours'])
    with pytest.raises(LqaError, match='"license" is not one of ours'):
        publishing.push("decoder", folder, "me/decoder")
    assert not hub.repos


def test_what_a_reader_would_be_refused_is_not_pushed(folder):
    def refused(words):
        with pytest.raises(LqaError, match=words):
            publishing.prepare("decoder", folder, "me/decoder")

    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    refused("holds a pickle")
    (folder / "adapter_model.bin").unlink()
    name_base(folder, "other/base")
    refused("names the base 'other/base', the sidecar 'tiny/smol'")
    name_base(folder)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({k: t.fill_(float("nan")) for k, t in tensors.items()}, weights)
    refused("is not finite")
    weights.write_bytes(weights.read_bytes()[:-5])
    refused("is damaged")
    weights.unlink()
    refused("not a decoder: it has no adapter_model.safetensors")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["decoder", "not-there", "me/x"], "not a decoder: it has no adapter_model.safetensors"),
        (["steering", "decoders/smollm2-135m-instruct", "me/x"], "not a steering"),
        (["dataset", "not-there", "me/x"], "not a dataset: it has no README.md"),
        (["space", "dataset", "me/x"], "not a space: it has no app.py"),
        (["dataset", "dataset", "me/x", "--results", "results/identify"], "go into a decoder's card"),
        (["dataset", "dataset", "me/x"], "HF_HUB_OFFLINE is set"),
    ],
)
def test_bad_pushes_are_one_sentence_and_exit_code_2(argv, words, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    assert main(["push", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and words in captured.err and len(captured.err.strip().splitlines()) == 1


def test_dry_run_prints_files_and_card_and_needs_no_network(capsys, folder, results):
    assert main(["push", "decoder", str(folder), "me/decoder", "--dry-run", "--results", str(results)]) == 0
    out = capsys.readouterr().out
    for expected in ("adapter_model.safetensors", "results/identify.json", "README.md", "base_model: tiny/smol", "31.2% (25.0 to 37.5)"):
        assert expected in out


# --- what cannot be loaded ---------------------------------------------------------------------------------------


def test_every_failure_to_load_is_one_sentence(hub, folder, tiny, monkeypatch):
    publishing.push("decoder", folder, "me/decoder")
    good = {name: file.content for name, file in hub.repos["model", "me/decoder"].commits[-1].files.items()}
    tensors = load_file(folder / "adapter_model.safetensors")

    def weights(change) -> bytes:
        save_file({k: change(t).contiguous() for k, t in tensors.items()}, folder / "changed.safetensors", metadata={"format": "pt"})
        return (folder / "changed.safetensors").read_bytes()

    def repo(name, **files) -> str:
        held = good | {key.replace("__", "."): content for key, content in files.items()}
        hub.add("model", f"me/{name}", {key: content for key, content in held.items() if content is not None})
        return f"me/{name}"

    def refused(words, source, **options):
        with pytest.raises(LqaError, match=words) as error:
            load(tiny, source, **options)
        assert "\n" not in str(error.value)

    refused("tokenizer fingerprint .* but tiny/llama has", "me/decoder", family="llama")
    refused("no lqa_config.json.*preset", repo("bare", lqa_config__json=None))
    refused("lacks adapter_model.safetensors", repo("weightless", adapter_model__safetensors=None))
    refused(r"holds a pickle \(adapter_model.bin\)", repo("pickled", adapter_model__bin=b"\x80\x04."))
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.bin"))  # and it is not downloaded
    refused("not finite", repo("nan", adapter_model__safetensors=weights(lambda t: t * float("nan"))))
    refused("does not fit tiny/smol: .*size mismatch", repo("shapes", adapter_model__safetensors=weights(lambda t: t[:-1])))
    refused("truncated or damaged", repo("cut", adapter_model__safetensors=good["adapter_model.safetensors"][:-7]))
    refused("has no revision 'v9'", "me/decoder", revision="v9")
    refused("neither a folder here nor a repository on the Hub that you may read", "me/nothing")
    refused("neither a folder here nor a Hub id", "a/b/c")
    refused("a folder here and has no revisions", folder, revision="main")

    hub.repos["model", "me/gated"] = hub.repos["model", "me/decoder"].__class__("model", "me/gated", gated=True)
    hub.repos["model", "me/gated"].commits = hub.repos["model", "me/decoder"].commits
    refused("is gated: accept its terms at .*/me/gated.*hf auth login", "me/gated")
    with pytest.raises(LqaError, match="base model 'me/gated' is gated: accept its terms"):
        load_base("me/gated")
    private = repo("private")
    hub.repos["model", private].private = True
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    refused("that you may read.*if it is private", private)


def test_no_network_and_no_cache(hub, tiny, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LqaError, match="not in the cache, and the Hub cannot be reached"):
        load(tiny)
    with pytest.raises(LqaError, match="base model 'me/base'.*not in the cache, and the Hub cannot be reached"):
        load_base("me/base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.__exit__()  # now nobody answers
    with pytest.raises(LqaError, match="at the revision 'v1'.*not in the cache, and the Hub cannot be reached"):
        load(tiny, revision="v1")


def test_remote_code_is_never_run(hub):
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    hub.add("model", "me/own", {"config.json": json.dumps(config).encode(), "own.py": b"raise SystemExit('run')"})
    with pytest.raises(LqaError, match="me/own"):
        load_base("me/own")


@pytest.mark.slow
def test_the_templates_are_in_the_wheel(tmp_path):
    root = Path(__file__).parent.parent
    for name in ("lqa", "train", "hub_cards"):
        shutil.copytree(root / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(root / name, tmp_path / "source")
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", *build, str(tmp_path / "source")], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "from lqa import cards; print(cards.__file__, *sorted(p.name for p in cards.CARDS.iterdir()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True, check=True)
    file, *names = done.stdout.split()
    assert file.startswith(str(tmp_path / "site")) and set(names) >= {p.name for p in (root / "hub_cards").glob("*.md")}
