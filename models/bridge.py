"""Schrodinger bridges between data and a Gaussian: likelihood training (SB-FBSDE) and iterative proportional fitting.

Base process dx = f dt + g dw with f = -reversion x and constant g on [0, duration]. Two policies bend it: forwards
dx = (f + g Z) dt + g dw from the data, in reverse time dx = (-f + g Zhat) ds + g dw from the prior. At the optimum
Z + Zhat = g grad log p_t. Z = 0, Zhat = g score is a linear diffusion; with it training begins. Both directions are
sampled: `Bridge.sample` runs from the prior to data, `Bridge.trajectory` and `Bridge.to_prior` from data to the prior.

"fbsde": Chen, Liu, Theodorou 2022 (ICLR, "Likelihood Training of Schrodinger Bridge using FBSDEs"), algorithm 3.
"joint": its algorithm 2, both policies at once through the whole path. "dsb": De Bortoli et al. 2021 (NeurIPS,
"Diffusion Schrodinger Bridge"), mean matching.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.base import Loss, Phase
from models.chain import Kernel, backward_path, forward_path
from models.noise import Generator, StepRandom, normal
from models.nonlinear import NonlinearDiffusion, TimedNetwork
from models.options import Count, NonNegative, Positive, Probability
from models.sde import expand

Method = Literal["fbsde", "joint", "dsb"]
# dimensions up to which the divergence in the loss is exact; above, one Rademacher probe a point
EXACT_DIVERGENCE = 4


class Policy(nn.Module):
    """A score network as a policy on [0, duration], in coordinates that suit a grid whose steps grow geometrically.

    Such a grid is t_k = a (r^k - 1) with a = duration / (growth - 1): fine for data with modes of width g sqrt(a).
    The network sees the place on the grid, log(1 + t/a) / log(growth), and with ``magnify`` its output is divided by
    sqrt(t + a), about the width of a mode of p_t: what remains is of order one. growth = 1: t / duration, undivided.
    """

    def __init__(self, net: nn.Module, duration: float, growth: float = 1.0, magnify: bool = False):
        super().__init__()
        self.net = TimedNetwork(net, 0.0, 1.0, 1.0)
        self.duration, self.growth, self.magnify = duration, growth, magnify and growth > 1
        self.onset = duration / (growth - 1) if growth > 1 else math.inf

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """t (B,) in [0, duration] -> a field of x's shape."""
        place = (t / self.onset).log1p() / math.log(self.growth) if self.growth > 1 else t / self.duration
        field = self.net(x, place)
        return field / expand((t + self.onset).sqrt(), x) if self.magnify else field


class Bridge(NonlinearDiffusion):
    """Policies ``forward_policy`` Z(x, t) and ``backward_policy`` Zhat(x, t), callables (x, t (B,)) -> field.

    Training alternates: ``warm_steps`` steps of denoising score matching for Zhat with Z = 0 (stage 0), then stages of
    ``forward_steps`` steps for Z along paths of the frozen averaged Zhat and ``stage_steps`` steps for Zhat along paths
    of Z; ``milestones`` are the ends of stages. Paths are drawn again every ``refresh`` steps, and each of their rows
    gives ``points`` points a step.

    The paths in use are a buffer, of no entries until the first are drawn: with it and the frozen policies a checkpoint
    continues bit for bit in the middle of a stage. Of several processes each simulates its own rows of the batch and
    gathers the others', so that the loss, up to rounding, is independent of their number.
    """

    name = "bridge"
    family = "semi-linear, discrete"

    def __init__(
        self,
        forward_policy: nn.Module,
        backward_policy: nn.Module,
        shape: Sequence[int],
        method: Method = "fbsde",
        steps: int = 50,
        duration: float = 1.0,
        g: float = 1.0,
        reversion: float = 0.0,
        growth: float = 1.0,
        prior_std: float = 1.0,
        warm_steps: int = 500,
        stage_steps: int = 250,
        forward_steps: int = 250,
        refresh: int = 25,
        points: int = 4,
        average: float = 0.99,
        scale: float = 1.0,
    ):
        # steps grow by the factor `growth` from first to last: fine ones at the data, where they set the bound
        widths = torch.logspace(0, math.log10(growth), steps, dtype=torch.float64) if growth != 1 else torch.ones(steps)
        times = torch.cat([torch.zeros(1, dtype=torch.float64), (widths / widths.sum()).cumsum(0).double()]) * duration
        super().__init__(shape, times, prior_std, scale)
        self.forward_policy, self.backward_policy = forward_policy, backward_policy
        self.frozen_forward = copy.deepcopy(forward_policy).requires_grad_(False)
        self.frozen_backward = copy.deepcopy(backward_policy).requires_grad_(False)
        self.method, self.g, self.reversion = method, g, reversion
        self.warm_steps, self.stage_steps, self.forward_steps = warm_steps, stage_steps, forward_steps
        self.refresh, self.points, self.average = refresh, points, average
        self.register_buffer("paths", torch.zeros(0))

    @classmethod
    def from_options(
        cls,
        shape: Sequence[int],
        drift: dict[str, Any],
        score: dict[str, Any],
        method: Method = "fbsde",
        steps: Count = 50,
        duration: Positive = 1.0,
        g: Positive = 1.0,
        reversion: NonNegative = 0.0,
        growth: Positive = 1.0,
        prior_std: Positive = 1.0,
        warm_steps: Count = 500,
        stage_steps: Count = 250,
        forward_steps: Count = 250,
        refresh: Count = 25,
        points: Count = 4,
        average: Probability = 0.99,
        scale: Positive = 1.0,
    ) -> Bridge:
        """Build from component options: ``drift`` is the forward policy's network, ``score`` the backward one's."""
        from models.registry import component

        policies = [
            # Zhat alone holds the data's score, which is steep at small times
            Policy(component(kind, options, shape=list(shape)), duration, growth, magnify=kind == "score")
            for kind, options in (("drift", drift), ("score", score))
        ]
        process = (steps, duration, g, reversion, growth, prior_std)
        schedule = (warm_steps, stage_steps, forward_steps, refresh, points, average)
        return cls(*policies, shape, method, *process, *schedule, scale)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # the paths have the shape of the run that drew them
        if (stored := state_dict.get(f"{prefix}paths")) is not None:
            self.paths = stored.to(self.paths.device, copy=True)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def base_drift(self, x: Tensor) -> Tensor:
        """f of the base process."""
        return -self.reversion * x

    def forward_drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.base_drift(x) + self.g * self.forward_policy(x, t)

    def reverse_drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.g * self.backward_policy(x, t) - self.base_drift(x)

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.g)

    # Training ------------------------------------------------------------------------------------------------------

    def half_at(self, step: int) -> tuple[str, int]:
        """(what is trained at a step: "warm", "forward" or "backward"; the step's place within that half)."""
        if step < self.warm_steps:
            return "warm", step
        place = (step - self.warm_steps) % (self.forward_steps + self.stage_steps)
        return ("forward", place) if place < self.forward_steps else ("backward", place - self.forward_steps)

    def renews_paths(self, step: int) -> bool:
        """Whether the step's place within its half is a multiple of ``refresh``."""
        return self.half_at(step)[1] % self.refresh == 0

    def drop_paths(self) -> None:
        self.paths = self.paths[:0]

    def milestones(self, steps: int) -> list[int]:
        """The steps, of so many, after which a stage ends, the warm one included: where the bound should have fallen.

        [] for the joint method, which has no stages.
        """
        if self.method == "joint":
            return []
        return list(range(self.warm_steps, steps + 1, self.forward_steps + self.stage_steps))

    def phases(self) -> list[Phase]:
        """One phase a policy, each in its halves; the joint method has one phase for both."""
        groups = {"drift": list(self.forward_policy.parameters()), "score": list(self.backward_policy.parameters())}
        if self.method == "joint":
            return [Phase("joint", groups, self.joint_loss)]
        trains_forward = lambda step: self.half_at(step)[0] == "forward"  # noqa: E731
        return [
            Phase("forward", {"drift": groups["drift"]}, self.forward_loss, when=trains_forward),
            Phase("backward", {"score": groups["score"]}, self.backward_loss, when=lambda s: not trains_forward(s)),
        ]

    def forward_loss(self, x: Tensor, random: StepRandom) -> Loss:
        """Z learns along backward paths of the frozen Zhat."""
        self._follow(self.frozen_forward, self.forward_policy, random)
        start = self.prior_std * random.normal("prior", x.shape[1:], x.dtype)
        made, met, i = self._points(random, lambda: self._simulate(self.frozen_backward, start, random, forward=False))
        return self._policy_loss(self.forward_policy, self.frozen_backward, made, met, i, random, forward=True)

    def backward_loss(self, x: Tensor, random: StepRandom) -> Loss:
        """Zhat learns along forward paths of the frozen Z; in the warm half, where Z = 0, by denoising."""
        x = x / self.scale
        self._follow(self.frozen_backward, self.backward_policy, random)
        if self.half_at(random.step)[0] == "warm":
            return self._denoising_loss(x, random)
        made, met, i = self._points(random, lambda: self._simulate(self.frozen_forward, x, random, forward=True))
        return self._policy_loss(self.backward_policy, self.frozen_forward, made, met, i, random, forward=False)

    @torch.no_grad()
    def _follow(self, frozen: nn.Module, live: nn.Module, random: StepRandom) -> None:
        """The frozen copy is the moving average of its policy over the half that trains it; the other half uses it."""
        place = self.half_at(random.step)[1]
        decay = min(self.average, place / (10 + place))  # nothing is kept of earlier halves
        torch._foreach_lerp_(list(frozen.parameters()), list(live.parameters()), 1 - decay)

    @torch.no_grad()
    def _simulate(self, frozen: nn.Module, x: Tensor, random: StepRandom, forward: bool) -> Tensor:
        """Paths (steps + 1, B, ...) of the chain that a frozen policy drives, from data or from the prior."""
        times, source = self.times.cpu(), random.source("paths")

        def kernel(z: Tensor, i: int) -> Kernel:
            width, t = float(times[i + 1] - times[i]), self._at(times[i if forward else i + 1], z)
            variance = z.new_full((), self.g**2 * width)
            return Kernel(z + width * self._driven(frozen, z, t, forward), variance)

        steps = len(times) - 1
        if forward:
            return forward_path(x, steps, kernel, source)
        return backward_path(x, steps, kernel, source, last_mean=False)

    def _driven(self, policy: nn.Module, z: Tensor, t: Tensor, forward: bool) -> Tensor:
        """The drift of a policy in its own direction of time."""
        return (1.0 if forward else -1.0) * self.base_drift(z) + self.g * policy(z, t)

    def _points(self, random: StepRandom, simulate: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(x_i, x_{i+1}, i) at ``points`` random places a row of the stored paths, which are drawn anew when due.

        The steps i cover the grid evenly over the batch; the paths are those of all processes.
        """
        if self.renews_paths(random.step) or not len(self.paths):
            self.paths = gathered_rows(simulate())
        steps, rows = self.paths.shape[0] - 1, self.paths.shape[1]
        offsets = torch.arange(self.points, device=self.paths.device) / self.points
        i = (((random.stratified("steps")[:, None] + offsets) % 1.0).flatten() * steps).long().clamp_max(steps - 1)
        j = (random.uniform("points", (self.points,)).flatten() * rows).long().clamp_max(rows - 1)
        return self.paths[i, j], self.paths[i + 1, j], i

    def _policy_loss(
        self, live: nn.Module, frozen: nn.Module, x0: Tensor, x1: Tensor, i: Tensor, random: StepRandom, forward: bool
    ) -> Loss:
        """Loss of one policy on steps between x_i = x0 and x_{i+1} = x1 of the paths that the frozen one made.

        A policy is trained where its own kernel is evaluated: Z at the earlier, Zhat at the later end of a step.
        """
        times, dims = self.times.to(x0), x0[0].numel()
        earlier, later = times[i], times[i + 1]
        width = later - earlier
        z, t = (x0, earlier) if forward else (x1, later)
        if self.method == "dsb":
            # the map that undoes the frozen one's step, e.g. B(x_{k+1}) = x_{k+1} + F(x_k) - F(x_{k+1})
            origin, made = (x1, later) if forward else (x0, earlier)
            wide = expand(width, z)
            with torch.no_grad():
                change = self._driven(frozen, origin, made, not forward) - self._driven(frozen, z, made, not forward)
                target = origin - z + wide * change
            error = (wide * self._driven(live, z, t, forward) - target).flatten(1).square().sum(1)
            loss = 0.5 * (error / (self.g**2 * width)).mean() / dims  # in units of the step's own noise
        else:
            with torch.no_grad():
                other = frozen(z, t)
            policy, divergence = self._with_divergence(live, z, t, random)
            rate = (0.5 * policy.square() + policy * other).flatten(1).sum(1) + self.g * divergence
            loss = (len(times) - 1) * (width * rate).mean() / dims
        return loss, {"policy": loss.detach()}

    def _with_divergence(self, policy: nn.Module, z: Tensor, t: Tensor, random: StepRandom) -> tuple[Tensor, Tensor]:
        """(policy(z, t), its divergence in z (B,)) with a graph of the second order."""
        leaf = z if z.requires_grad else z.detach().requires_grad_()
        # fused attention has no second derivative
        with sdpa_kernel(SDPBackend.MATH):
            output = policy(leaf, t)
        if z[0].numel() <= EXACT_DIVERGENCE:
            flat = output.flatten(1)
            columns = [
                torch.autograd.grad(flat[:, d].sum(), leaf, create_graph=True)[0].flatten(1)[:, d]
                for d in range(flat.shape[1])
            ]
            return output, torch.stack(columns).sum(0)
        points = len(z) // random.rows[1]  # of a row of the batch
        probe = (random.uniform("probe", (points, *z.shape[1:])).flatten(0, 1) >= 0.5).to(z) * 2 - 1
        (product,) = torch.autograd.grad(output, leaf, probe, create_graph=True)
        return output, (product * probe).flatten(1).sum(1)

    def base_marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of the base process, x_t | x_0 ~ N(alpha x_0, sigma^2 I)."""
        if self.reversion == 0:
            return torch.ones_like(t), self.g * t.sqrt()
        decay = torch.exp(-self.reversion * t)
        return decay, self.g * ((1 - decay.square()) / (2 * self.reversion)).sqrt()

    def _denoising_loss(self, x: Tensor, random: StepRandom) -> Loss:
        """1/2 |sigma Zhat / g + noise|^2 / D at later ends of the grid's steps: Zhat = g score of the base process."""
        i = (random.stratified("time") * (len(self.times) - 1)).long().clamp_max(len(self.times) - 2)
        t = self.times.to(x)[i + 1]
        noise = random.normal("noise", x.shape[1:], x.dtype)
        alpha, sigma = (expand(v, x) for v in self.base_marginal(t))
        error = sigma / self.g * self.backward_policy(alpha * x + sigma * noise, t) + noise
        loss = 0.5 * error.square().mean()
        return loss, {"denoising": loss.detach()}

    def joint_loss(self, x: Tensor, random: StepRandom) -> Loss:
        """Loss / D of both policies through the whole path: sum of D_i [1/2 |Z + Zhat|^2 + div(g Zhat - f)] - log pi.

        A Riemann sum of the continuous bound (algorithm 2), which a coarse grid lets fall below the entropy; the bound
        that is reported is the chain's own. Its minima are all pairs of mutually reverse processes that end in the
        prior: unlike the alternating methods, it keeps nothing of the base process.
        """
        x, source, dims = x / self.scale, random.source("paths"), x[0].numel()
        times, total = self.times.cpu(), 0.0
        for i in range(len(times) - 1):
            width, t = float(times[i + 1] - times[i]), self._at(times[i], x)
            forward = self.forward_policy(x, t)
            # the graph of the path stays whole: the divergence is taken at x itself
            x = x if x.requires_grad else x.requires_grad_()
            backward, divergence = self._with_divergence(self.backward_policy, x, t, random)
            rate = 0.5 * (forward + backward).flatten(1).square().sum(1) + self.g * divergence + self.reversion * dims
            total = total + width * rate
            noise = normal(x.shape, source, x.device, x.dtype)
            x = x + width * (self.base_drift(x) + self.g * forward) + self.g * width**0.5 * noise
        loss = (total - self.prior_log_prob(x)).mean() / dims + math.log(self.scale)
        return loss, {"bound": loss.detach()}

    @torch.no_grad()
    def to_prior(self, x: Tensor, steps: int = 0, generator: Generator = None) -> Tensor:
        """Data x (B, *shape) -> its end on the forward chain, distributed as the prior N(0, prior_std^2 I) (B, *shape).

        The counterpart of :meth:`sample`, which goes from prior to data; ``steps`` 0: the model's own grid. All points
        of the way: :meth:`trajectory`, in the data's units.
        """
        steps = steps or len(self.times) - 1
        forward, _ = self.kernels(self.grid(steps))
        return forward_path(x / self.scale, steps, forward, generator)[-1]


@torch.no_grad()
def gathered_rows(paths: Tensor) -> Tensor:
    """Paths (steps + 1, B, ...) of this process's rows -> those of all processes, in the order of the global batch."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return paths
    parts = [torch.empty_like(paths) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, paths.contiguous())
    return torch.cat(parts, 1)
