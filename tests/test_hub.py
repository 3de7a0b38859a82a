"""Cards are rendered from files and valid; a training run becomes a decoder folder; Hub ids that cannot be had say why."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from lqa import LatentDecoder, LqaError
from lqa.cli import main
from lqa.config import DecoderConfig
from lqa.hub import write_decoder_card
from train import export

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
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    return folder


@pytest.fixture
def results(tmp_path):
    (tmp_path / "identify.json").write_text(json.dumps(RESULTS))
    return tmp_path


def test_card_is_valid_and_every_number_comes_from_the_files(run, results, tmp_path):
    out = tmp_path / "tiny-decoder"
    export.export(run, out, results)
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0" and data["library_name"] == "peft" and data["base_model"] == "tiny/smol"
    assert data["base_model_relation"] == "adapter" and data["pipeline_tag"] == "text-generation" and "latentqa" in data["tags"]
    (first, second) = data["model-index"][0]["results"]
    assert first["metrics"][0]["value"] == 0.3125 and "fixed" in first["dataset"]["name"] and "own" in second["dataset"]["name"]
    text = card.text
    figures = ("| ours | 31.2% (25.0 to 37.5) | 280 |", "12.5% (12.5 to 12.5)", "Own message", "some labels", "4.100", "4.300")
    for expected in (*figures, "1,080 readings", "3,240 question-answer pairs", "![Loss"):
        assert expected in text, expected
    for leftover in ("{{", "{%", "More Information Needed", "None", "By layer", str(tmp_path)):
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
    assert "A fake" in write_decoder_card(decoder_folder("smol", corpus=mixture, training=TRAINING)).read_text()


def test_card_without_metrics_says_so(run):
    write_decoder_card(run)
    card = ModelCard.load(run / "README.md")
    assert "Not evaluated yet" in card.text and "model-index" not in card.data.to_dict()


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
