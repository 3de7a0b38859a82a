"""Capture: the residual stream exactly as the model has it, no deeper than asked, and no trace left."""

import pytest
import torch

from lqa.activations import Capture, capture, gather_spans
from lqa.errors import LqaError

IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def hooks(base):
    return [id(hook) for module in base.model.modules() for hook in [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]]


@torch.no_grad()
def test_capture_is_the_model_s_hidden_states_at_every_layer(base):
    states = base.model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
    last = len(base.blocks) - 1
    acts = capture(base.model, base.blocks, IDS, MASK, range(last + 1))
    for k in range(last):
        assert torch.equal(acts[k], states[k + 1])
    norm = base.model.get_decoder().norm  # transformers gives the last state behind the final norm
    torch.testing.assert_close(norm(acts[last]), states[last + 1], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_right_padding_changes_nothing(base):
    batch = capture(base.model, base.blocks, IDS, MASK, [0, 2])
    alone = capture(base.model, base.blocks, IDS[1:, :3], MASK[1:, :3], [0, 2])
    for k in (0, 2):
        torch.testing.assert_close(batch[k][1, :3], alone[k][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layers", "runs"), [([0], [1, 0, 0]), ([1, 0], [1, 1, 0]), ([2, 2], [1, 1, 1])])
def test_the_pass_stops_after_the_deepest_layer(base, layers, runs):
    own, seen = hooks(base), [0] * len(base.blocks)
    handles = []
    for k, block in enumerate(base.blocks):

        def count(*_, k=k):
            seen[k] += 1

        handles.append(block.register_forward_pre_hook(count))
    head = []
    handles.append(base.model.get_output_embeddings().register_forward_pre_hook(lambda *_: head.append(1)))
    acts = capture(base.model, base.blocks, IDS, MASK, layers)
    assert seen == runs and head == [] and sorted(acts) == sorted(set(layers))
    for handle in handles:
        handle.remove()
    assert hooks(base) == own


def test_without_stop_the_pass_runs_to_its_end(tiny):
    base = tiny("llama")
    with torch.no_grad(), Capture(base.blocks, [0], stop=False) as captured:
        logits = base.model(input_ids=IDS, attention_mask=MASK).logits
    assert logits.shape[:2] == IDS.shape and captured[0].shape == (2, 5, base.hidden_size)


def test_no_hook_is_left_after_an_exception_and_it_is_not_swallowed(tiny):
    base = tiny("llama")
    own = hooks(base)
    with pytest.raises(ZeroDivisionError), Capture(base.blocks, [0, 1]):
        raise ZeroDivisionError
    assert hooks(base) == own
    with pytest.raises(IndexError):
        capture(base.model, base.blocks, torch.tensor([[10**6]]), torch.ones(1, 1, dtype=torch.long), [1])
    assert hooks(base) == own


@pytest.mark.parametrize("layer", [3, -1])
def test_a_layer_that_is_not_there_is_an_error_and_leaves_no_hook(tiny, layer):
    base = tiny("llama")
    own = hooks(base)
    with pytest.raises(LqaError, match=f"no block {layer}; this model has the blocks 0 to 2"):
        capture(base.model, base.blocks, IDS, MASK, [0, layer])
    assert hooks(base) == own


def test_a_pass_that_does_not_reach_the_layer_is_an_error_that_names_it(tiny):
    base = tiny("llama")
    own = hooks(base)
    with pytest.raises(LqaError, match=r"\[1\]"), Capture(base.blocks, [1]):
        base.embeddings(IDS)
    assert hooks(base) == own


def test_captures_nest_without_ending_each_other(tiny):
    base = tiny("llama")
    with torch.no_grad(), Capture(base.blocks, [2]) as outer:
        with Capture(base.blocks, [0]) as inner:
            base.model(input_ids=IDS)
        base.model(input_ids=IDS)
    assert inner[0].shape == outer[2].shape


def test_gradients_flow_from_captured_activations_into_the_layers_up_to_there(base):
    acts = capture(base.model, base.blocks, IDS, MASK, [1])
    acts[1][:, :3].pow(2).sum().backward()
    reached = [any(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters()) for block in base.blocks]
    assert reached == [True, True, False] and base.embeddings.weight.grad.abs().sum() > 0


def test_gather_spans_goes_row_by_row_and_layer_block_by_layer_block():
    acts = {0: torch.arange(12.0).view(2, 3, 2), 1: 100 + torch.arange(12.0).view(2, 3, 2)}
    got = gather_spans(acts, [[1, 2], [0]], [[0, 1], [1]])
    assert got.tolist() == [[2, 3], [4, 5], [102, 103], [104, 105], [106, 107]]
