import pytest
import torch

from expertmesh.train.losses import (
    consistency_loss,
    load_balancing_loss,
    router_z_loss,
    smoothed_cross_entropy,
)


def routed(logits_TE, top_k):
    return torch.topk(logits_TE, top_k, dim=-1).indices


def balanced(experts, top_k, scale=3.0):
    """Every expert is the first choice of one token, the second choice of another, and so on."""
    logits_TE = torch.zeros(experts, experts)
    for token in range(experts):
        for choice in range(top_k):
            logits_TE[token, (token + choice) % experts] = scale * (top_k - choice)
    return logits_TE


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balanced_routes_cost_one(top_k):
    logits_TE = balanced(8, top_k)
    assert load_balancing_loss(logits_TE, routed(logits_TE, top_k)).item() == pytest.approx(1.0, abs=1e-6)


def test_one_expert_for_all_costs_as_much_as_there_are_experts():
    logits_TE = torch.zeros(16, 4)
    logits_TE[:, 2] = 50.0
    assert load_balancing_loss(logits_TE, routed(logits_TE, 1)).item() == pytest.approx(4.0, abs=1e-4)


def test_skewed_routes_cost_more_the_more_skewed_they_are():
    generator = torch.Generator().manual_seed(0)
    noise_TE = torch.randn(256, 8, generator=generator)
    costs = []
    for skew in (0.0, 1.0, 3.0):
        logits_TE = noise_TE + skew * torch.arange(8) / 8
        costs.append(load_balancing_loss(logits_TE, routed(logits_TE, 2)).item())
    assert costs == sorted(costs)
    assert costs[-1] > costs[0] + 0.2


def test_fractions_are_of_what_was_dispatched_and_not_of_what_was_probable():
    logits_TE = torch.tensor([[0.2, 0.0]]).repeat(10, 1)
    probability_E = torch.softmax(logits_TE, dim=-1).mean(dim=0)
    of_probabilities = 2 * probability_E.square().sum()
    cost = load_balancing_loss(logits_TE, routed(logits_TE, 1))
    assert cost.item() == pytest.approx(2 * probability_E[0].item())
    assert cost.item() > of_probabilities.item() + 0.05
    elsewhere = torch.ones(10, 1, dtype=torch.int64)
    assert load_balancing_loss(logits_TE, elsewhere).item() == pytest.approx(2 * probability_E[1].item())


def test_the_gradient_lowers_the_probability_of_the_busy_expert():
    logits_TE = torch.tensor([[2.0, 0.0, 0.0]]).repeat(5, 1).requires_grad_()
    load_balancing_loss(logits_TE, routed(logits_TE.detach(), 1)).backward()
    assert (logits_TE.grad[:, 0] > 0).all()
    assert (logits_TE.grad[:, 1:] < 0).all()


def test_z_loss_is_the_mean_squared_log_sum_exp():
    logits_TE = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    log2 = torch.log(torch.tensor(2.0))
    assert router_z_loss(logits_TE).item() == pytest.approx(((log2**2 + (3 + log2) ** 2) / 2).item())


def test_smoothing_moves_a_share_of_the_target_to_all_classes():
    logits_BC = torch.tensor([[2.0, 0.0, -1.0, 0.5]])
    target_BC = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    log_C = torch.log_softmax(logits_BC, dim=-1)[0]
    smoothed = -(0.9 * log_C[0] + 0.1 * log_C.mean())
    assert smoothed_cross_entropy(logits_BC, target_BC, 0.1).item() == pytest.approx(smoothed.item())
    assert smoothed_cross_entropy(logits_BC, target_BC, 0.0).item() == pytest.approx(-log_C[0].item())


def test_consistency_is_free_between_equals_and_symmetric_between_others():
    first, second = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert consistency_loss(first, first).item() == pytest.approx(0.0, abs=1e-7)
    assert consistency_loss(first, second).item() == pytest.approx(consistency_loss(second, first).item())
    assert consistency_loss(first, second).item() > 0.1
