"""What the estimators are tried on: exact scores with closed-form integrals, trained networks, and residual flows."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.estimators.measured_runs import MEASURED_RUNS
from models.flows import ResidualFlow
from models.indm import INDM
from models.sde import VESDE, VPSDE, LinearSDE, SubVPSDE

SEED = 0
MEAN, STD, CORRELATION = 0.2, 0.6, 0.9
OFFSET = 0.2  # of a wrong score's noise prediction
DIMS = (2, 16)
SDES = {"vp": VPSDE, "subvp": SubVPSDE, "ve": VESDE}
QUADRATURE_NODES = 400
FLOW = {"shape": [16], "blocks": 2, "hidden": 32}


@dataclass
class Problem:
    """A model and test images x (I, *shape); ``integral``: the bound's int (e - D) d lambda of each, nats (I,)."""

    name: str
    model: INDM
    x: Tensor
    trained: bool = False
    integral: Tensor | None = None


@dataclass
class FlowProblem:
    """A residual flow in evaluation mode and points x (I, *shape)."""

    name: str
    flow: ResidualFlow
    x: Tensor
    trained: bool = False


class CorrelatedGaussian(nn.Module):
    """The score of N(MEAN, C) data under a linear SDE, C_ij = STD^2 CORRELATION^|i - j|, in float64.

    ``offset``: error of the noise prediction along each eigenvector of C, at every time; 0: the score is exact.
    """

    def __init__(self, sde: LinearSDE, dims: int, offset: float = 0.0):
        super().__init__()
        self.offset = offset
        place = torch.arange(dims, dtype=torch.float64)
        covariance = STD**2 * CORRELATION ** (place[:, None] - place).abs()
        self.sde = sde
        self.values, self.vectors = torch.linalg.eigh(covariance)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(z), z (B, D), t (B,)."""
        alpha, sigma = (v[:, None] for v in self.sde.marginal(t))
        exact = ((z - alpha * MEAN) @ self.vectors) / (alpha**2 * self.values + sigma**2)
        return -(exact + self.offset / sigma) @ self.vectors.T

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws of the data (count, D)."""
        noise = torch.randn(count, len(self.values), generator=generator, dtype=torch.float64)
        return MEAN + (noise * self.values.sqrt()) @ self.vectors.T

    def error(self, x: Tensor, log_ratio: Tensor) -> Tensor:
        """E |noise_hat - noise|^2 of images x (I, D) at the noise levels lambda (K,), (I, K), nats.

            In an eigenvector's direction noise_hat - noise is (sigma alpha d - alpha^2 c n) / (alpha^2 c + sigma^2)
        + offset, d = x - MEAN there and c the variance.
        """
        alpha, sigma = (v[:, None] for v in self.sde.marginal(self.sde.time(log_ratio)))
        total = alpha**2 * self.values + sigma**2
        distance = ((x - MEAN) @ self.vectors)[:, None]
        return (
            (sigma * alpha * distance / total + self.offset).square() + (alpha**2 * self.values / total).square()
        ).sum(-1)

    def integral(self, x: Tensor) -> Tensor:
        """int (E |noise_hat - noise|^2 - D) d lambda over [lambda(eps), lambda(1)], nats (I,), by Gauss's rule."""
        import numpy as np

        low, high = self.sde.log_ratio_range(x)
        nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(QUADRATURE_NODES))
        levels = low + (high - low) * (nodes + 1) / 2
        return (self.error(x, levels) - x.shape[1]) @ weights * (high - low) / 2


def gaussian_problem(name: str, dims: int, images: int, offset: float = 0.0) -> Problem:
    """A correlated Gaussian under the named SDE; the same images for every SDE."""
    sde = SDES[name]()
    score = CorrelatedGaussian(sde, dims, offset)
    x = score.sample(images, torch.Generator().manual_seed(SEED))
    label = f"gaussian-{dims} {name}" + (f" noise off by {offset:g}" if offset else "")
    return Problem(label, INDM(sde, score, shape=(dims,)), x, integral=score.integral(x))


def score_problems(images: int) -> tuple[list[Problem], dict[str, str]]:
    """Closed forms, then the trained networks that exist (seed SEED); and name -> status of those that do not."""
    problems, missing = [gaussian_problem(name, dims, images) for dims in DIMS for name in SDES], {}
    # what weights the neighbourhood of eps heavily is good only while the score is right there
    problems += [gaussian_problem(name, DIMS[0], images, OFFSET) for name in SDES]
    for suite, variant in MEASURED_RUNS:
        name = f"{suite} {variant}"
        found = _trained(name, suite, variant, images)
        if isinstance(found, str):
            missing[name] = found
        else:
            problems.append(found)
    return problems, missing


def _trained(name: str, suite: str, variant: str, images: int) -> Problem | str:
    from bench.config import load_suite
    from bench.data import load
    from bench.errors import InputError
    from bench.evaluate import load_model
    from bench.likelihood import test_points

    try:
        (run, *_) = load_suite(suite).runs(variant, SEED)
        model = load_model(run)
    except InputError:
        return f"not defined: {suite}/{variant} seed {SEED} is not trained"
    return Problem(name, model, test_points(load(run.dataset), images, run.seed), trained=True)


def flow_problems(problems: list[Problem], images: int) -> list[FlowProblem]:
    """A fresh residual flow, one near its Lipschitz bound, and the flows of the trained networks."""
    x = 0.1 * torch.rand(images, *FLOW["shape"], generator=torch.Generator().manual_seed(SEED)) - 0.05
    flows = [FlowProblem("fresh flow", fresh_flow(), x)]
    flows.append(FlowProblem("flow near its bound", near_bound(fresh_flow()), x))
    for problem in problems:
        flow = problem.model.flow
        if isinstance(flow, ResidualFlow):
            points = problem.x / problem.model.scale
            flows.append(FlowProblem(f"{problem.name} flow", copy.deepcopy(flow), points, problem.trained))
    return flows


def fresh_flow() -> ResidualFlow:
    """FLOW as it is initialised from SEED, in evaluation mode and without gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return ResidualFlow(**FLOW).eval().requires_grad_(False)


def near_bound(flow: ResidualFlow) -> ResidualFlow:
    """Make each block's Jacobian near the origin have a spectral radius close to its bound, coefficient^3.

    The cap is on rows' absolute sums: weights of one sign reach it as a norm too. Blocks take turns in the sign, for
    both ends of the spectrum.
    """
    with torch.no_grad():
        for number, block in enumerate(block for level in flow.levels for block in level):
            for layer in block.layers:
                # large weights: all rows sit at the cap
                layer.weight.copy_(layer.weight.abs() * math.sqrt(layer.weight[0].numel()))
                layer.bias.mul_(0.05)
            block.layers[-1].weight.mul_((-1.0) ** number)
    return flow
