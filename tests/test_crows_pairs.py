"""The suite `crows-pairs` on pairs written for this test."""

import pytest
import torch

from lqa import LqaError
from lqa.chat import render
from lqa.cli import main
from lqa.evals import crows_pairs
from lqa.evals.suite import Job
from lqa.journal import Journal

PAIRS = [("Cooks like it.", "Doctors like it."), ("A pirate will cook.", "A person will cook."), ("They speak.", "We speak formally.")]


@pytest.fixture
def folder(tmp_path):
    lines = [f'{7 * i},"{more}","{less}",stereo,kind{i % 2}' for i, (more, less) in enumerate(PAIRS)]
    (tmp_path / "crows_pairs").mkdir()
    path = tmp_path / "crows_pairs" / "crows_pairs_anonymized.csv"
    path.write_text("\n".join([",sent_more,sent_less,stereo_antistereo,bias_type", *lines]) + "\n")
    return tmp_path


def by_hand(base, text: str, system: str | None) -> float:
    front = [{"role": "system", "content": system}] if system else []
    ids = render(base.tokenizer, [*front, {"role": "user", "content": crows_pairs.REQUEST}]).ids
    own = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad(), base.using():
        logprobs = base.model(input_ids=torch.tensor([ids + own])).logits[0, -len(own) - 1 : -1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(own).unsqueeze(1)).sum().item()


def test_likelihoods_are_those_of_full_sentences_and_differences_are_paired(tiny_decoder, folder, tmp_path):
    decoder = tiny_decoder()

    def run():
        with Journal(tmp_path / "journal.jsonl", {}) as journal:
            given = {
                "data": folder,
                "limit": None,
                "methods": ["unsteered", "system_prompt", "caa"],
                "examples": 4,
                "kept": tmp_path / "made",
            }
            return crows_pairs.run(Job("crows-pairs", decoder, journal, **given))

    result = run()
    found = {row: [e["logprobs"][row] for e in result.items] for row in ("unsteered", "system_prompt", "caa")}
    for row, system in (("unsteered", None), ("system_prompt", crows_pairs.CONTROL)):
        expected = [[by_hand(decoder.base, text, system) for text in pair] for pair in PAIRS]
        assert torch.allclose(torch.tensor(found[row]), torch.tensor(expected), atol=2e-4)
    rows = result.tables["pairs"].rows
    size = {row: sum(abs(a - b) for a, b in own) / 3 for row, own in found.items()}
    for row, cells in rows.items():
        assert cells[0].mean == pytest.approx(size[row]) and cells[1].mean == pytest.approx(size[row] - size["unsteered"], abs=1e-9)
        assert cells[2].mean == pytest.approx(sum(a > b for a, b in found[row]) / 3) and cells[0].n == 3
    assert rows["unsteered"][1].low == rows["unsteered"][1].high == 0 and rows["caa"][5].mean == 4
    assert [e["id"] for e in result.items] == ["0", "7", "14"] and not any(text in str(result) for pair in PAIRS for text in pair)
    assert run() == result


def test_a_tie_is_half():
    assert (
        crows_pairs.both([-2.0, -2.0]) == (0, 0.5) and crows_pairs.both([-1.0, -3.0]) == (2, 1) and crows_pairs.both([-3.0, -1.0]) == (2, 0)
    )


def test_missing_or_odd_data_is_one_sentence_that_names_the_home(folder, tmp_path, capsys):
    assert main(["eval", "crows-pairs", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert "github.com/nyu-mll/crows-pairs" in said and "\n" not in said and not (tmp_path / "out").exists()
    path = folder / "crows_pairs" / "crows_pairs_anonymized.csv"
    with pytest.raises(LqaError, match="holds no crows_pairs_dev.csv or .*nyu-mll"):
        crows_pairs.load(tmp_path / "crows_pairs" / "nowhere")
    path.write_text(path.read_text().replace("sent_less", "other"))
    with pytest.raises(LqaError, match="lacks one of sent_more, sent_less"):
        crows_pairs.load(folder)
