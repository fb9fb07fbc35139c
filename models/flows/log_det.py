"""log|det(I + J)| of a residual block: exactly, or by an unbiased estimate.

*Exact*: J is built column by column from products with the basis. Its log-determinant is differentiable.

*Series*: log det(I + J) = sum_k (-1)^(k+1) tr(J^k) / k with Hutchinson's trace, tr(J^k) = E[e' J^k e], cut at a random
length N ("Russian roulette") and reweighted so that the expectation is the whole series (Chen et al. 2019, "Residual
Flows", arXiv:1906.02735, eq. 6). Its gradient is tr((I + J)^-1 dJ) = E[e' dJ u] with u = sum_k (-1)^k J^k e, under the
same roulette (eq. 8), where u is a constant: one product with a graph. The official INDM code returns e' J u itself,
an estimate of tr(J (I + J)^-1); here the *value* is the log-determinant's and the *gradient* the Neumann series'.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.flows.lipschitz import Jacobian
from models.noise import BatchGenerator, Generator, IndexedGenerator

RouletteKind = Literal["geometric", "poisson"]
ProbeKind = Literal["rademacher", "gaussian"]

# Elements of the largest tensor while columns of J are computed: what a CPU's cache or a GPU's memory holds with ease.
COLUMN_BUDGET = {"cpu": 2**17, "cuda": 2**26}


@dataclass(frozen=True)
class Roulette:
    """Distribution of the number N of random terms after the fixed ones, and its draws.

    For term k the weight is 1[N >= k] / P(N >= k). With ||J^k|| ~ rho^k the second moment is of the order of
    sum_k rho^(2k) / P(N >= k), so the tail P must not fall faster than rho^(2k); at the Lipschitz bound of a block,
    rho = 0.98^3, that is 0.886^k. A Poisson's tail falls like rate^k / k!, so its second moment is infinite for every
    rho > 0, which begins to show when rho is large; the official code uses Poisson(2) and relies on gradient clipping.
    "geometric": with probability `entry` the sum goes on after the fixed terms, then each time with probability `stay`,
    0.9 so that the second moment is finite up to the bound. The mean length entry / (1 - stay) = 2.5 costs about what
    Poisson(2) costs; entry = 1 is the plain geometric distribution, less noisy at four times the cost.
    """

    kind: RouletteKind = "geometric"
    entry: float = 0.25
    stay: float = 0.9
    rate: float = 2.0

    def draw(self, count: int, groups: int, generator: Generator = None) -> Tensor:
        """Lengths N for `count` samples, int64 (count,) on the CPU, one for each of `groups` runs (at most).

        The runs' uniform numbers are one draw shifted by equal steps around [0, 1): each N has exactly its
        distribution, while the work of a call, which is the number of terms in all, hardly varies.
        """
        if isinstance(generator, BatchGenerator):
            return generator.own(lambda size, source: self.draw(size, groups, source), on_host=True)
        groups = min(count, groups)
        if isinstance(generator, IndexedGenerator):  # each sample's own, whatever batch it is in
            uniform, groups = generator.uniform((count,), dtype=torch.float64).cpu().clamp_min(1e-12), count
        else:
            device = "cpu" if generator is None else generator.device
            start = torch.rand((), generator=generator, dtype=torch.float64, device=device).cpu()
            uniform = ((start + torch.arange(groups, dtype=torch.float64) / groups) % 1.0).clamp_min(1e-12)
        lengths, k = torch.zeros(groups, dtype=torch.int64), 1
        while (longer := uniform < self.survival(k)).any():
            lengths, k = lengths + longer, k + 1
        return lengths[torch.arange(count) * groups // count]

    def survival(self, k: int) -> float:
        """P(N >= k)."""
        if k <= 0:
            return 1.0
        if self.kind == "poisson":
            # The regularised lower incomplete gamma function is the Poisson's upper tail, without cancellation.
            return torch.special.gammainc(*torch.tensor([k, self.rate], dtype=torch.float64)).item()
        return self.entry * self.stay ** (k - 1)


def columns(jacobian: Jacobian, like: Tensor) -> Tensor:
    """J's columns (B, D, D), [b, i, o] = d g_o / d a_i of sample b; `like` (B, ...) is the point, for its shape."""
    batch, dims = len(like), like[0].numel()
    # Products with the basis, a few samples at a time and if need be a few columns at a time.
    budget = COLUMN_BUDGET.get(like.device.type, COLUMN_BUDGET["cuda"])
    width = max(slope[0].numel() for slope in jacobian.slopes if slope is not None)
    samples = max(1, min(batch, budget // (width * dims)))
    tangents = max(1, min(dims, budget // (width * samples)))
    basis = torch.eye(dims, dtype=like.dtype, device=like.device).reshape(dims, 1, *like.shape[1:])
    rows = []
    for start in range(0, batch, samples):
        few = jacobian.at(slice(start, start + samples))
        count = min(samples, batch - start)
        parts = [few @ part.expand(-1, count, *like.shape[1:]) for part in basis.split(tangents)]
        rows.append(torch.cat(parts).flatten(2).transpose(0, 1))
    return torch.cat(rows).to(like.dtype)


def log_det_from_columns(columns: Tensor) -> Tensor:
    """log|det(I + J)| from the columns (or rows) of J, (..., D, D) -> (...), nats; differentiable."""
    dims = columns.shape[-1]
    if dims == 1:
        return torch.log1p(columns[..., 0, 0])
    if dims == 2:
        p, q, r, s = columns.flatten(-2).unbind(-1)
        return torch.log1p(p + s + p * s - q * r)
    return torch.linalg.slogdet(columns + torch.eye(dims, dtype=columns.dtype, device=columns.device)).logabsdet


def series(jacobian: Jacobian, probe: Tensor, depth: Tensor, fixed: int, roulette: Roulette) -> Tensor:
    """Unbiased estimate of log|det(I + J)|, nats (B,), with an unbiased gradient.

    `probe` (B, ...) has independent entries of mean 0 and variance 1; `depth` (B,) int64 on the CPU holds the draws of
    `roulette`; the first `fixed` powers of J are always used.
    """
    # Samples are sorted by length, so those still in the sum are a leading slice. Its size is rounded up to eighths of
    # the batch, since a convolution of a size not met before costs more to set up than to run.
    # The sort is stable: where no sample draws a random term, the order is that of the Jacobian, which stays as it is.
    order = torch.argsort(depth, descending=True, stable=True)
    lengths = depth[order].to(probe.device, non_blocking=True)
    step = max(1, len(probe) // 8)
    alive = [-(-n // step) * step for n in torch.bincount(depth).flip(0).cumsum(0).flip(0)[1:].tolist()]
    order = order.to(probe.device, non_blocking=True)
    with torch.no_grad():
        frozen, start = jacobian.detach(), probe[order]
        if alive:
            frozen = frozen.at(order)
        power, neumann = start, start.clone()
        value = start.new_zeros(len(start))
        for k in range(1, fixed + len(alive) + 1):
            weight: float | Tensor = (-1.0) ** k
            if k > fixed:
                if (count := alive[k - fixed - 1]) < len(power):
                    power, frozen = power[:count], frozen.at(slice(count))
                drawn = (lengths[: len(power)] >= k - fixed).to(start.dtype)
                weight = drawn * (weight / roulette.survival(k - fixed))
            power = frozen @ power
            count = len(power)
            value[:count] -= weight / k * (start[:count] * power).flatten(1).sum(1)
            if k > fixed:
                weight = weight.reshape(-1, *(1,) * (power.ndim - 1))
            neumann[:count] += weight * power
            # What is left is at most |power| rho / (1 - rho) in the mean. Below rounding there is nothing to add, and
            # on a CPU denormal numbers cost many times the arithmetic. Elsewhere the test would make the host wait.
            if k % 4 == 0 and power.device.type == "cpu" and power.abs().amax() < 0.01 * torch.finfo(start.dtype).eps:
                break
        back = torch.argsort(order)
        value, neumann = value[back], neumann[back]
    if not torch.is_grad_enabled():
        return value
    surrogate = (probe * (jacobian @ neumann)).flatten(1).sum(1)
    return value + (surrogate - surrogate.detach())


def draw_probe(kind: ProbeKind, like: Tensor, generator: Generator = None) -> Tensor:
    """Hutchinson probe of `like`'s shape, dtype and device."""
    if isinstance(generator, BatchGenerator):
        return generator.own(lambda size, source: draw_probe(kind, like[:1].expand(size, *like.shape[1:]), source))
    if isinstance(generator, IndexedGenerator):
        own = generator.normal if kind == "gaussian" else generator.rademacher
        return own(like.shape, like.device, like.dtype)
    device = like.device if generator is None else generator.device
    if kind == "gaussian":
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=device).to(like.device)
    bits = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8, device=device)
    return bits.to(like.device, like.dtype).mul_(2).sub_(1)
