"""The counter of FLOPs and live memory against what can be counted by hand."""

import pytest
import torch

from bench.step_costs import count_flops, peak_bytes, step_costs

ROWS, WIDTH = 64, 32
PRODUCT = 2 * ROWS * WIDTH * WIDTH
MATRIX = 4 * ROWS * WIDTH


def test_a_nested_gradient_is_counted():
    layer, x = torch.nn.Linear(WIDTH, WIDTH), torch.randn(ROWS, WIDTH)

    def step():
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
        slope.sum().backward()

    # y; its product with the weights; backward of both: two products each, and the leaf's own gradient
    assert count_flops(step) % PRODUCT == 0
    assert 5 * PRODUCT <= count_flops(step) <= 7 * PRODUCT


@pytest.mark.parametrize("depth", [2, 10, 40])
def test_live_memory_grows_with_what_backward_needs(depth):
    x = torch.randn(ROWS, WIDTH)

    def forward(y):
        for _ in range(depth):
            y = y.tanh()
        return y

    with torch.no_grad():
        assert peak_bytes(lambda: forward(x)) == pytest.approx(2 * MATRIX, abs=MATRIX)
    leaf = x.clone().requires_grad_()
    assert peak_bytes(lambda: forward(leaf).sum().backward()) == pytest.approx((depth + 2) * MATRIX, abs=2 * MATRIX)


def test_existing_tensors_and_views_cost_nothing():
    x = torch.randn(ROWS, WIDTH)
    costs = step_costs(lambda: (x.t(), x.view(-1), x.mul_(2.0)))
    assert costs.flops == 0
    assert costs.peak_bytes == 0
