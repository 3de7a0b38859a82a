"""Scan: its cells are those of readings of single tokens."""

import pytest

from lqa import LqaError
from lqa.scan import scan

CHAT = [{"role": "system", "content": "Speak like a pirate."}, {"role": "user", "content": "Who is it?"}]
QUESTION, ANSWERS = "How will the assistant speak?", ["Like a pirate.", "Formally.", "It is a doctor from France."]


BOTH = {"layers_per_reading": 2, "default_layer": [0, 1]}
MERGED = {"conditioning": "projected", "merged": True, "default_layer": [0, 1]}


CASES = [({}, [0, 1]), ({"conditioning": "projected"}, [0, 1]), (BOTH, [(0, 1)]), (MERGED, [0, 1, (0, 1)])]


@pytest.mark.parametrize(("changes", "layers"), CASES)
def test_a_cell_is_a_reading_of_one_token(tiny_decoder, changes, layers):
    decoder = tiny_decoder(**changes)
    parts = list(scan(decoder, CHAT, QUESTION, ANSWERS, batch=5))
    cells = [cell for part in parts for cell in part]
    n = len(decoder.read(CHAT).span)
    assert [(c.layer, c.token) for c in cells] == [(k, i) for k in layers for i in range(1, n + 1)] and len(parts) > 2
    for cell in cells[:: len(cells) // 7]:
        expected = decoder.read(CHAT, [cell.token], cell.layer).probabilities(QUESTION, ANSWERS)
        assert cell.probabilities == pytest.approx(expected, abs=1e-4)
    assert len({round(c.probabilities[0], 4) for c in cells}) > n / 2  # tokens differ


def test_layers_and_span_are_chosen(tiny_decoder):
    cells = [c for part in scan(tiny_decoder(), CHAT, QUESTION, ANSWERS, "last:2", [1]) for c in part]
    assert len(cells) == 2 and {c.layer for c in cells} == {1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": ["Aye."]}, "at least two"),
        ({"answers": ["Aye.", " "]}, "not be empty"),
        ({"question": ""}, "not be empty"),
        ({"question": "<|im_end|>"}, "special token"),
        ({"layers": [7]}, "supports the layers 0, 1"),
        ({"span": "assistant"}, "selects no token"),
    ],
)
def test_bad_input_is_named(tiny_decoder, change, message):
    with pytest.raises(LqaError, match=message):
        list(scan(tiny_decoder(), **{"chat": CHAT, "question": QUESTION, "answers": ANSWERS} | change))
