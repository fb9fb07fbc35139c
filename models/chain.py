"""The one bound of every model that is a chain of Gaussian steps (DiffFlow, Schrodinger bridges, DDPM, NCSN).

Forward kernels p_F(x_{i+1} | x_i) = N(m_F, v_F I) carry data to noise, backward kernels p_B(x_i | x_{i+1}) =
N(m_B, v_B I) generate. For any kernels and any number of steps

    -log p_B(x_0) <= E_{p_F}[ -log pi(x_N) + sum_i log p_F(x_{i+1} | x_i) - log p_B(x_i | x_{i+1}) ],

a true bound for the chain itself, unlike a Riemann sum of the continuous bound on a coarse grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.noise import Generator, normal


@dataclass(frozen=True)
class Kernel:
    """N(mean, variance I): mean (B, ...), variance a scalar tensor."""

    mean: Tensor
    variance: Tensor

    def sample(self, generator: Generator = None) -> Tensor:
        """One draw a row, of the mean's shape."""
        noise = normal(self.mean.shape, generator, self.mean.device, self.mean.dtype)
        return self.mean + self.variance.sqrt() * noise


Step = Callable[[Tensor, int], Kernel]


def step_term(earlier: Tensor, later: Tensor, forward: Kernel, backward: Kernel) -> Tensor:
    """log p_F(later | earlier) - log p_B(earlier | later), nats (B,)."""
    dims = earlier[0].numel()
    back = (earlier - backward.mean).flatten(1).square().sum(1) / backward.variance
    ahead = (later - forward.mean).flatten(1).square().sum(1) / forward.variance
    return 0.5 * (back - ahead + dims * (backward.variance / forward.variance).log())


def chain_bound(
    x: Tensor,
    steps: int,
    forward: Step,
    backward: Step,
    prior_log_prob: Callable[[Tensor], Tensor],
    generator: Generator = None,
) -> dict[str, Tensor]:
    """Parts of the bound, nats (B,): prior and diffusion, along one forward path from x (B, ...).

    ``forward(x_i, i)`` and ``backward(x_{i+1}, i)`` are the kernels of step i = 0..steps-1.
    """
    total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for i in range(steps):
        ahead = forward(x, i)
        later = ahead.sample(generator)
        total = total + step_term(x, later, ahead, backward(later, i))
        x = later
    return {"prior": -prior_log_prob(x), "diffusion": total}


def forward_path(x: Tensor, steps: int, forward: Step, generator: Generator = None) -> Tensor:
    """x_0, ..., x_N of one forward chain, (steps + 1, B, ...)."""
    path = [x]
    for i in range(steps):
        path.append(forward(path[-1], i).sample(generator))
    return torch.stack(path)


def backward_path(x: Tensor, steps: int, backward: Step, generator: Generator = None, last_mean: bool = True) -> Tensor:
    """x_0, ..., x_N of one backward chain from x = x_N, (steps + 1, B, ...); the last step adds no noise by default."""
    path = [x]
    for i in reversed(range(steps)):
        kernel = backward(path[-1], i)
        path.append(kernel.mean if last_mean and i == 0 else kernel.sample(generator))
    return torch.stack(path[::-1])
