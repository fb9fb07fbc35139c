"""log|det(I + J)| of a residual block: exactly, or by an unbiased estimate.

*Exact*: J is built column by column from products with the basis. Its log-determinant is differentiable.

*Series*: log det(I + J) = sum_k (-1)^(k+1) tr(J^k) / k with Hutchinson's trace, tr(J^k) = E[e' J^k e], cut at a random
length N ("Russian roulette") and reweighted so that the expectation is the whole series (Chen et al. 2019, "Residual
Flows", arXiv:1906.02735, eq. 6). Its gradient is tr((I + J)^-1 dJ) = E[e' dJ u] with u = sum_k (-1)^k J^k e, under the
same roulette (eq. 8), where u is a constant: one product with a graph. The official INDM code returns e' J u itself,
an estimate of tr(J (I + J)^-1); here the *value* is the log-determinant's and the *gradient* the Neumann series'.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.flows.lipschitz import Jacobian

# Elements of the largest intermediate tensor while columns of J are computed: 64 MiB in float32.
COLUMN_BUDGET = 2**24


@dataclass(frozen=True)
class Roulette:
    """Distribution of the number N of random terms after the `fixed` ones, drawn for each sample on its own.

    For term k the weight is 1[N >= k] / P(N >= k). With ||J^k|| ~ rho^k the second moment is of the order of
    sum_k rho^(2k) / P(N >= k), so the tail P must not fall faster than rho^(2k); at the Lipschitz bound of a block,
    rho = 0.98^3, that is 0.886^k. A Poisson's tail falls like rate^k / k!, so its second moment is infinite for every
    rho > 0, which begins to show when rho is large; the official code uses Poisson(2) and relies on gradient clipping.
    "geometric": with probability `entry` the sum goes on after the fixed terms, then each time with probability `stay`,
    0.9 so that the second moment is finite up to the bound. The mean length entry / (1 - stay) = 2.5 costs about what
    Poisson(2) costs; entry = 1 is the plain geometric distribution, less noisy at four times the cost.
    """

    kind: Literal["geometric", "poisson"] = "geometric"
    entry: float = 0.25
    stay: float = 0.9
    rate: float = 2.0

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` independent lengths N, int64 on the CPU."""
        device = "cpu" if generator is None else generator.device
        if self.kind == "poisson":
            rates = torch.full((count,), self.rate, dtype=torch.float64, device=device)
            return torch.poisson(rates, generator=generator).long().cpu()
        # P(N >= k) = entry * stay^(k-1) = P(U < entry * stay^(k-1)), solved for the largest such k.
        uniform = torch.rand(count, generator=generator, dtype=torch.float64, device=device).clamp_min(1e-300).cpu()
        return (1 + torch.floor(torch.log(uniform / self.entry) / math.log(self.stay))).clamp_min(0).long()

    def survival(self, k: int) -> float:
        """P(N >= k)."""
        if k <= 0:
            return 1.0
        if self.kind == "poisson":
            # The regularised lower incomplete gamma function is the Poisson's upper tail, without cancellation.
            return torch.special.gammainc(torch.tensor(float(k), dtype=torch.float64), torch.tensor(self.rate)).item()
        return self.entry * self.stay ** (k - 1)


def exact(jacobian: Jacobian, like: Tensor) -> Tensor:
    """log|det(I + J)|, nats (B,), differentiable; `like` is a point's batch (B, ...), for its shape and dtype."""
    batch, dims = like.shape[0], like[0].numel()
    width = max(s[0].numel() for s in jacobian.slopes if s is not None)
    size = max(1, COLUMN_BUDGET // max(1, batch * width))
    basis = torch.eye(dims, dtype=like.dtype, device=like.device).reshape(dims, 1, *like.shape[1:])
    parts = [(jacobian @ part.expand(-1, *like.shape)).flatten(2) for part in basis.split(size)]
    columns = parts[0] if len(parts) == 1 else torch.cat(parts)  # (in, B, out)
    if dims == 1:
        return torch.log1p(columns[0, :, 0])
    if dims == 2:
        a, b = columns.unbind(0)
        (p, q), (r, s) = a.unbind(1), b.unbind(1)
        return torch.log1p(p + s + p * s - q * r)
    matrix = columns.permute(1, 2, 0) + torch.eye(dims, dtype=like.dtype, device=like.device)
    return torch.linalg.slogdet(matrix.contiguous()).logabsdet


def series(jacobian: Jacobian, probe: Tensor, depth: Tensor, fixed: int, roulette: Roulette) -> Tensor:
    """Unbiased estimate of log|det(I + J)|, nats (B,), with an unbiased gradient.

    `probe` (B, ...) has independent entries of mean 0 and variance 1; `depth` (B,) int64 on the CPU holds the draws of
    `roulette`; the first `fixed` powers of J are always used.
    """
    # Samples are sorted by length, so those still in the sum are always a leading slice.
    order = torch.argsort(depth, descending=True).to(probe.device)
    alive = torch.bincount(depth).flip(0).cumsum(0).flip(0)[1:].tolist()
    sorted_probe = probe[order]
    with torch.no_grad():
        frozen = jacobian.detach().at(order)
        power, sum_ = sorted_probe, sorted_probe.clone()
        value = torch.zeros(probe.shape[0], dtype=torch.promote_types(probe.dtype, torch.float32), device=probe.device)
        for k in range(1, fixed + len(alive) + 1):
            count = alive[k - fixed - 1] if k > fixed else len(probe)
            if count < len(power):
                power, frozen = power[:count], frozen.at(slice(count))
            power = frozen @ power
            weight = (-1.0) ** k / roulette.survival(k - fixed)
            value[:count] -= weight / k * (sorted_probe[:count] * power).flatten(1).sum(1)
            sum_[:count] += weight * power
        inverse_order = torch.argsort(order)
        value, sum_ = value[inverse_order], sum_[inverse_order]
    if not torch.is_grad_enabled():
        return value
    surrogate = (probe * (jacobian @ sum_)).flatten(1).sum(1)
    return value + (surrogate - surrogate.detach())


def probes(kind: str, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Hutchinson probe of `like`'s shape, dtype and device: "rademacher" or "gaussian"."""
    device = like.device if generator is None else generator.device
    if kind == "gaussian":
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=device).to(like.device)
    bits = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8, device=device)
    return bits.to(like.device, like.dtype).mul_(2).sub_(1)
