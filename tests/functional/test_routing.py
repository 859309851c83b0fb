"""Routing: choices, weights, losses and permutation against loops and hand-worked values."""

import pytest
import torch

from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.functional import (
    balance_step,
    combine,
    dispatch,
    expert_load,
    group_by_expert,
    route_top_k,
    switch_loss,
    z_loss,
)


def test_top_k_weights_are_the_softmax_of_the_chosen_logits():
    logits = torch.randn(9, 5, dtype=torch.float64)
    choice = route_top_k(logits, 3)
    for t in range(9):
        ids = sorted(range(5), key=lambda i: -logits[t, i])[:3]
        assert choice.experts[t].tolist() == ids
        torch.testing.assert_close(choice.weights[t], logits[t, ids].softmax(0))
    torch.testing.assert_close(choice.weights.sum(1), torch.ones(9, dtype=torch.float64))


def test_balance_bias_steers_the_choice_and_not_the_weights():
    logits = torch.tensor([[3.0, 2.0, 1.0]], requires_grad=True)
    choice = route_top_k(logits, 2, torch.tensor([-10.0, 0.0, 0.0]))
    assert choice.experts.tolist() == [[1, 2]]
    torch.testing.assert_close(choice.weights, torch.tensor([[2.0, 1.0]]).softmax(-1))
    choice.weights[0, 0].backward()
    assert logits.grad[0, 0] == 0 and logits.grad[0, 1] != 0


@pytest.mark.parametrize("k", [0, 4])
def test_k_out_of_range(k):
    with pytest.raises(ConfigError, match=f"got top_k={k}, num_experts=3"):
        route_top_k(torch.zeros(2, 3), k)


def test_switch_loss_is_one_when_uniform_and_num_experts_at_collapse():
    uniform = torch.full((8, 4), 0.25)
    spread = torch.arange(8).reshape(8, 1) % 4
    assert switch_loss(uniform, spread).item() == pytest.approx(1.0)
    collapsed = torch.nn.functional.one_hot(torch.zeros(8, dtype=torch.int64), 4).float()
    assert switch_loss(collapsed, torch.zeros(8, 1, dtype=torch.int64)).item() == pytest.approx(4.0)


def test_losses_have_gradients_that_match_finite_differences():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    experts = logits.detach().topk(2).indices
    assert torch.autograd.gradcheck(lambda z: switch_loss(z.softmax(-1), experts), (logits,))
    assert torch.autograd.gradcheck(z_loss, (logits,))
    grad = torch.autograd.grad(switch_loss(logits.softmax(-1), experts), logits)[0]
    assert grad.abs().max() > 1e-4


def test_z_loss_value():
    logits = torch.tensor([[0.0, 0.0]])
    assert z_loss(logits).item() == pytest.approx(torch.log(torch.tensor(2.0)).item() ** 2)


def test_balance_step_lowers_the_busy_and_raises_the_idle():
    bias = balance_step(torch.zeros(4), torch.tensor([9, 0, 3, 0]), 0.1)
    torch.testing.assert_close(bias, torch.tensor([-0.1, 0.1, 0.0, 0.1]))


def test_load_counts_every_slot():
    experts = torch.randint(0, 5, (40, 3))
    assert expert_load(experts, 7).tolist() == [int((experts == e).sum()) for e in range(7)]


@pytest.mark.parametrize(
    ("tokens", "k", "num_experts"), [(1, 1, 1), (1, 2, 8), (13, 3, 5), (50, 2, 64)]
)
def test_dispatch_and_combine_equal_a_loop(tokens, k, num_experts):
    x = torch.randn(tokens, 6, dtype=torch.float64)
    experts = torch.stack([torch.randperm(num_experts)[:k] for _ in range(tokens)])
    weights = torch.rand(tokens, k, dtype=torch.float64)
    groups = group_by_expert(experts, num_experts)
    assert groups.counts.sum() == tokens * k
    assert torch.equal(groups.expert, groups.expert.sort().values)
    scale = torch.randn(num_experts, 6, dtype=torch.float64)
    rows = dispatch(x, groups, k) * scale[groups.expert]
    out = combine(rows, weights, groups)
    for t in range(tokens):
        expected = sum(weights[t, j] * scale[experts[t, j]] * x[t] for j in range(k))
        torch.testing.assert_close(out[t], expected)
