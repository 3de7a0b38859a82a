"""Injection: the three operations against tensors written out by hand, their gradients, and a hook that cannot fail in silence."""

import pytest
import torch

from lqa.errors import LqaError
from lqa.injection import Injection, Operation, inject

REPLACE, SCALED, ADD = Operation("replace"), Operation("replace_scaled", 10.0), Operation("add_normed", 2.0)

# Two rows of three positions, two wide; slots at (0, 1), (0, 2), (1, 0); one activation per slot, in that order.
RESIDUAL = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [0.0, 5.0]], [[6.0, 8.0], [7.0, 7.0], [9.0, 9.0]]])
SLOTS = torch.tensor([[False, True, True], [True, False, False]])
ACTIVATIONS = torch.tensor([[3.0, 4.0], [0.0, -2.0], [5.0, 0.0]])
WRITTEN = {
    REPLACE: [[3.0, 4.0], [0.0, -2.0], [5.0, 0.0]],
    SCALED: [[6.0, 8.0], [0.0, -10.0], [10.0, 0.0]],
    ADD: [[3 + 2 * 5 * 0.6, 4 + 2 * 5 * 0.8], [0.0, 5 - 2 * 5], [6 + 2 * 10, 8.0]],  # z + a |z| h/|h|
}
operations = pytest.mark.parametrize("operation", [REPLACE, SCALED, ADD], ids=lambda o: o.name)


@operations
def test_the_operation_by_hand(operation):
    a, b, c = WRITTEN[operation]
    expected = torch.tensor([[[1.0, 2.0], a, b], [c, [7.0, 7.0], [9.0, 9.0]]])
    torch.testing.assert_close(inject(RESIDUAL, SLOTS, ACTIVATIONS, operation), expected, rtol=0, atol=1e-6)


@operations
def test_everything_but_the_slots_is_the_same_bits_and_nothing_is_written_in_place(operation):
    residual, activations = torch.randn(2, 5, 4), torch.randn(3, 4)
    slots = torch.zeros(2, 5, dtype=torch.bool)
    slots[0, 2] = slots[1, 1] = slots[1, 4] = True
    before = residual.clone(), activations.clone()
    out = inject(residual, slots, activations, operation)
    assert torch.equal(out[~slots], residual[~slots]) and not torch.equal(out[slots], residual[slots])
    assert torch.equal(residual, before[0]) and torch.equal(activations, before[1])
    assert out.data_ptr() != residual.data_ptr()


@operations
def test_no_slots_and_no_activations_pass_everything_through(operation):
    assert torch.equal(inject(RESIDUAL, torch.zeros_like(SLOTS), torch.empty(0, 2), operation), RESIDUAL)


def test_activations_are_cast_to_the_residual_s_dtype():
    out = inject(RESIDUAL.bfloat16(), SLOTS, ACTIVATIONS.double(), REPLACE)
    assert out.dtype == torch.bfloat16 and torch.equal(out[SLOTS].float(), ACTIVATIONS)


@operations
def test_gradients_are_those_of_finite_differences(operation):
    torch.manual_seed(0)
    residual = torch.randn(2, 3, 4, dtype=torch.double, requires_grad=True)
    activations = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, h: inject(z, SLOTS, h, operation), (residual, activations))


@operations
def test_gradients_are_those_of_a_slow_loop(operation):
    torch.manual_seed(0)
    weights = torch.randn(2, 3, 4)

    def gradients(function):
        torch.manual_seed(1)
        z, h = torch.randn(2, 3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
        (function(z, h) * weights).sum().backward()
        return z.grad, h.grad

    def loop(z, h):
        rows, n = [], 0
        for b in range(2):
            for s in range(3):
                v = z[b, s]
                if SLOTS[b, s]:
                    unit = h[n] / sum(x * x for x in h[n]) ** 0.5
                    new = {"replace": h[n], "replace_scaled": 10.0 * unit, "add_normed": v + 2.0 * sum(x * x for x in v) ** 0.5 * unit}
                    v, n = new[operation.name], n + 1
                rows.append(v)
        return torch.stack(rows).view(2, 3, 4)

    for fast, slow in zip(gradients(lambda z, h: inject(z, SLOTS, h, operation)), gradients(loop), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_another_number_of_activations_than_slots_is_an_error_with_both_numbers(count):
    with pytest.raises(LqaError, match=f"3 slots but {count} activations"):
        inject(RESIDUAL, SLOTS, torch.randn(count, 2), REPLACE)


@pytest.mark.parametrize(
    ("slots", "activations"), [(SLOTS, torch.randn(3, 5)), (SLOTS, torch.randn(3)), (SLOTS[:, :2], ACTIVATIONS), (SLOTS[:1], ACTIVATIONS)]
)
def test_shapes_that_do_not_fit_are_errors(slots, activations):
    with pytest.raises(LqaError, match="Shapes do not fit"):
        inject(RESIDUAL, slots, activations, REPLACE)


@operations
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_not_finite_are_errors(operation, value):
    activations = ACTIVATIONS.clone()
    activations[1, 0] = value
    with pytest.raises(LqaError, match="not finite"):
        inject(RESIDUAL, SLOTS, activations, operation)


@operations
def test_an_activation_of_zeros_does_not_become_nan(operation):
    activations = torch.zeros(3, 2, requires_grad=True)
    out = inject(RESIDUAL, SLOTS, activations, operation)
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(activations.grad).all()


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        (Operation("overwrite"), "unknown; supported are replace, replace_scaled, add_normed"),
        (Operation("replace", 1.0), "takes no constant"),
        (Operation("replace_scaled"), "needs a constant"),
        (Operation("add_normed"), "needs a constant"),
    ],
)
def test_operations_are_checked_before_any_pass(operation, words, tiny):
    with pytest.raises(LqaError, match=words):
        operation.check()
    with pytest.raises(LqaError, match=words):
        Injection(tiny("llama"), 0, operation)


# --- the hook ---------------------------------------------------------------------------------------------------

IDS = torch.tensor([[5, 6, 7, 8]])
MASK = torch.tensor([[False, True, True, False]])


def hooks(base):
    return [id(hook) for module in base.model.modules() for hook in [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]]


@torch.no_grad()
def states(base):
    """What every block is given, and the final norm: the residual stream behind the embeddings and behind every block."""
    seen = []
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for module in [*base.blocks, base.model.get_decoder().norm]
    ]
    base.model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("write_layer", [-1, 0, 1])
def test_the_hook_writes_the_slots_of_its_layer_in_every_family(base, write_layer):
    before, own = states(base), hooks(base)
    activations = torch.randn(2, base.hidden_size)
    with Injection(base, write_layer, REPLACE) as injection, injection.armed(MASK, activations):
        after = states(base)
    k = write_layer + 1
    for i in range(k):
        assert torch.equal(after[i], before[i])
    assert torch.equal(after[k][MASK], activations)
    assert torch.equal(after[k][~MASK], before[k][~MASK])
    torch.testing.assert_close(after[-1][:, 0], before[-1][:, 0], rtol=1e-5, atol=1e-5)  # before the slots: as ever
    assert (after[-1][:, 3] - before[-1][:, 3]).abs().max() > 1e-3
    assert hooks(base) == own


def test_nothing_is_injected_when_not_armed_and_nothing_after_disarming(tiny):
    base = tiny("llama")
    before = states(base)[-1]
    with Injection(base, 0, REPLACE) as injection:
        assert torch.equal(states(base)[-1], before)
        with injection.armed(MASK, torch.randn(2, base.hidden_size)):
            assert not torch.equal(states(base)[-1], before)
        assert torch.equal(states(base)[-1], before)
    assert torch.equal(states(base)[-1], before)


def test_an_injection_that_did_not_run_raises(tiny):
    base = tiny("llama")
    activations = torch.randn(2, base.hidden_size)
    with Injection(base, 0, REPLACE) as injection:
        with pytest.raises(LqaError, match="did not run"), injection.armed(MASK, activations):
            pass
        with pytest.raises(LqaError, match="did not run"), injection.armed(MASK, activations):
            base.model.lm_head(torch.randn(1, 4, base.hidden_size))
        with injection.armed(MASK, activations):
            states(base)
        with pytest.raises(LqaError, match="did not run"), injection.armed(MASK, activations):  # the pass before does not count
            pass


def test_no_hook_and_no_armed_values_are_left_after_an_exception(tiny):
    base = tiny("llama")
    before, own = states(base)[-1], hooks(base)
    with pytest.raises(ZeroDivisionError), Injection(base, 0, REPLACE) as injection, injection.armed(MASK, torch.randn(2, 32)):
        raise ZeroDivisionError
    assert hooks(base) == own and torch.equal(states(base)[-1], before)
    with (
        pytest.raises(LqaError, match="2 slots but 3"),
        Injection(base, 0, REPLACE) as injection,
        injection.armed(MASK, torch.randn(3, 32)),
    ):
        base.model(input_ids=IDS)
    assert hooks(base) == own and torch.equal(states(base)[-1], before)
    with Injection(base, 0, REPLACE) as injection:
        with pytest.raises(ZeroDivisionError), injection.armed(MASK, torch.randn(2, 32)):
            raise ZeroDivisionError
        assert torch.equal(states(base)[-1], before)  # still open, but no longer armed


def test_tuple_outputs_keep_their_other_entries(tiny):
    class Block(torch.nn.Module):
        def forward(self, x):
            return x, "attention"

    base = tiny("llama")
    base.blocks = [Block()]
    activations = torch.randn(2, 32)
    with Injection(base, 0, REPLACE) as injection, injection.armed(MASK, activations):
        out, other = base.blocks[0](torch.zeros(1, 4, 32))
    assert other == "attention" and torch.equal(out[MASK], activations)


def test_gradients_reach_the_activations_through_the_model_and_agree_with_checkpointing(tiny):
    base = tiny("llama")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            base.model.gradient_checkpointing_enable()
        base.model.train()
        torch.manual_seed(0)
        activations = torch.randn(2, base.hidden_size, requires_grad=True)
        with Injection(base, 0, SCALED) as injection, injection.armed(MASK, activations):
            base.model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append(activations.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-8)
