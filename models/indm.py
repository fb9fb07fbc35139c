"""INDM: an invertible flow before a linear diffusion (Kim et al., NeurIPS 2022, arXiv 2205.13699).

z_0 = h(x), dz = f z dt + g dw in latent space. With the identity flow this *is* DDPM++ (VP) or NCSN++ (VE): there is
no second code path.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from models.base import Loss, Phase
from models.flows import Identity, calls
from models.latent_likelihood import LatentLikelihood, squares
from models.noise import Generator, StepRandom, normal
from models.options import NonNegative, Positive
from models.samplers import SAMPLERS
from models.score.adapter import NetworkScore, Preconditioning, noise_function
from models.sde import LinearSDE, expand
from models.time_sampling import PROPOSALS, soft_truncation

ProposalName = Literal["importance", "uniform", "debiased"]


class INDM(LatentLikelihood):
    """flow + SDE + score. ``score(z, t) -> grad log p_t(z)`` may be a network or an exact, analytic score.

    ``setting``: "nll" trains score and flow on the bound in one phase; "fid" trains the flow on the bound and then
    the score on its variance-weighted loss (spec: the paper's two settings).
    ``scale`` divides the data first, a constant linear part of the flow (its log-determinant is counted).

    How the score meets its noise levels in training:
    ``proposal``: the law of its times (models.time_sampling), by default "importance" in the NLL and "uniform" in the
    FID setting. "nll" keeps the law's weights, so that every law has the bound's expectation; "fid" drops them. With
    the identity flow, nll is ScoreFlow's likelihood weighting, importance-sampled (Song et al. 2021, arXiv 2101.09258);
    fid with "uniform" or "debiased" times are the two losses of Huang, Lim and Courville 2021 (arXiv 2106.02808), the
    latter's gradient proportional to the bound's above t = 1e-3. A flow's own step always sees the whole bound.
    ``soft_truncation``: the exponent of models.time_sampling.soft_truncation; each batch's score loss is then that on
    [tau, 1]. The flow trains on the whole bound, in a phase of its own: a truncated one rewards inflated latents.
    ``pretrain``: steps in which only the score is trained, the flow bypassed: INDM started from a linear diffusion.
    """

    name = "indm"
    compilable = True

    def __init__(
        self,
        sde: LinearSDE,
        score: nn.Module,
        flow: nn.Module | None = None,
        setting: Literal["nll", "fid"] = "nll",
        shape: Sequence[int] | None = None,
        scale: float = 1.0,
        time_sampling: Literal["stratified", "independent"] = "stratified",
        proposal: ProposalName | None = None,
        soft_truncation: float | None = None,
        pretrain: int = 0,
    ):
        super().__init__()
        self.sde, self.score, self.flow = sde, score, flow if flow is not None else Identity()
        if soft_truncation is not None and proposal == "debiased":
            raise ValueError("soft_truncation: not with proposal = debiased, whose law near 0 is one of its own")
        if pretrain and not any(p.requires_grad for p in self.flow.parameters()):
            raise ValueError(f"pretrain = {pretrain}: this flow has no weights to wait for; accepted: 0")
        self.proposal, self.soft_truncation, self.pretrain = proposal, soft_truncation, pretrain
        self.setting, self.scale, self.time_sampling = setting, scale, time_sampling
        self.shape = tuple(shape or ())
        self.nfe: float | None = None
        self.prior_mean: Tensor | None = None  # of a sample's shape, for samplers with the option data_mean

    @classmethod
    def from_options(
        cls,
        shape: Sequence[int],
        sde: dict[str, Any],
        score: dict[str, Any],
        flow: dict[str, Any],
        setting: Literal["nll", "fid"] = "nll",
        preconditioning: Preconditioning = "none",
        scale: Positive = 1.0,
        time_sampling: Literal["stratified", "independent"] = "stratified",
        proposal: ProposalName | None = None,
        soft_truncation: NonNegative | None = None,
        pretrain: Annotated[int, Field(ge=0)] = 0,
    ) -> INDM:
        """Build from component options; the signature is the configuration schema."""
        from models.registry import component

        process = component("sde", sde)
        network = NetworkScore(component("score", score, shape=list(shape)), process, preconditioning)
        flow_options = {} if flow.get("name") == "identity" else {"shape": list(shape)}
        h = component("flow", flow, **flow_options)
        return cls(process, network, h, setting, shape, scale, time_sampling, proposal, soft_truncation, pretrain)

    @property
    def family(self) -> str:
        """Linear with the identity flow; with another one nonlinear in data space."""
        return "linear, continuous" if isinstance(self.flow, Identity) else "fully nonlinear, continuous"

    @property
    def eps(self) -> float:
        """Time at which the latent diffusion is cut off near the data."""
        return self.sde.eps

    @property
    def noise(self):
        """noise(z, t) = -sigma(t) score(z, t)."""
        return noise_function(self.score, self.sde)

    # Data space <-> latent space -----------------------------------------------------------------------------------

    def encode(self, x: Tensor, generator: Generator = None, bypass: bool = False) -> tuple[Tensor, Tensor]:
        """(z_0, log|det dz_0/dx| in nats (B,)); ``generator`` feeds the estimate and a global latent's draw.

        ``bypass``: leave out the flow's learned part.
        """
        z = x / self.scale if self.scale != 1 else x
        if bypass:
            log_det = z.new_zeros(len(z))
        else:
            z, log_det = calls.encode(self.flow, z, generator)
        if self.scale != 1:
            log_scale = torch.tensor(self.scale, dtype=torch.float64).log().to(log_det.dtype)
            log_det = log_det - x[0].numel() * log_scale.to(log_det.device, non_blocking=True)
        return z, log_det

    def latent(self, x: Tensor, generator: Generator = None) -> Tensor:
        """z_0 = h(x) alone, for those who need no log-determinant."""
        return calls.latent(self.flow, x / self.scale if self.scale != 1 else x, generator)

    def decode(self, z: Tensor, generator: Generator = None) -> Tensor:
        """x = h^{-1}(z_0). Raises FlowInverseError where the inverse does not converge."""
        x = calls.decode(self.flow, z, generator)
        return x * self.scale if self.scale != 1 else x

    def perturb(self, z0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """z_t = alpha z_0 + sigma noise."""
        alpha, sigma = self.sde.marginal(t)
        return expand(alpha, z0) * z0 + expand(sigma, z0) * noise

    # Training ------------------------------------------------------------------------------------------------------

    def phases(self) -> list[Phase]:
        """One phase for the NLL setting; flow, then score, for the FID setting or with soft truncation.

        A flow without weights has none. With ``pretrain``, the phase of that name comes first and alone.
        """
        flow = [p for p in self.flow.parameters() if p.requires_grad]
        score = [p for p in self.score.parameters() if p.requires_grad]
        groups = {"score": score} | ({"flow": flow} if flow else {})
        weighted = self.setting == "nll"
        joint = weighted and self.soft_truncation is None
        score_loss = self.likelihood_weighted_loss if weighted else self.variance_weighted_loss
        phases = [Phase("joint", groups, self.bound_loss)] if joint else [Phase("score", {"score": score}, score_loss)]
        if flow and not joint:
            phases.insert(0, Phase("flow", {"flow": flow}, self.flow_loss))
        if not self.pretrain:
            return phases
        linear_loss = partial(self.bound_loss if joint else score_loss, bypass=True)
        first = Phase("pretrain", {"score": score}, linear_loss, when=lambda step: step < self.pretrain)
        return [first, *(replace(phase, when=lambda step: step >= self.pretrain) for phase in phases)]

    def _uniforms(self, random: StepRandom, dtype) -> Tensor:
        draw = random.stratified if self.time_sampling == "stratified" else random.uniform
        return draw("time", dtype=dtype)

    def bound_loss(self, x: Tensor, random: StepRandom, bypass: bool = False) -> Loss:
        """NELBO / D without its constants and without the residual, nats/dim: score + flow + prior (INDM eq. 11).

        With importance-sampled time the score term is Z/2 |noise_hat - noise|^2. The prior term is its expectation.
        ``bypass``: as the linear diffusion that the flow's absence leaves.
        """
        z0, log_det = self.encode(x, random.whole("flow"), bypass)
        # the FID setting's law is its score's: the flow sees importance-sampled times
        name = (self.proposal if self.setting == "nll" else None) or "importance"
        t, weight = PROPOSALS[name](self.sde, self._uniforms(random, x.dtype))
        noise = random.normal("noise", x.shape[1:], dtype=x.dtype)
        dims = x[0].numel()
        error = squares(self.noise(self.perturb(z0, t, noise), t) - noise)
        terms = {
            "score": (weight * error).mean() / dims,
            "flow": -log_det.mean() / dims,
            "prior": self.sde.prior_cross_entropy(z0).mean() / dims,
        }
        return terms["score"] + terms["flow"] + terms["prior"], {k: v.detach() for k, v in terms.items()}

    def flow_loss(self, x: Tensor, random: StepRandom) -> Loss:
        """The bound for the flow alone: the score's weights, which this phase leaves as they are, get no gradient."""
        weights = [p for p in self.score.parameters() if p.requires_grad]
        for weight in weights:
            weight.requires_grad_(False)
        try:
            return self.bound_loss(x, random)
        finally:
            for weight in weights:
                weight.requires_grad_(True)

    def variance_weighted_loss(self, x: Tensor, random: StepRandom, bypass: bool = False) -> Loss:
        """|noise_hat - noise|^2 / (2D) with latents detached, the FID setting's score step: the law's weights dropped.

        Time is uniform on [eps, 1], or the FID setting's ``proposal``; with soft truncation on [tau, 1].
        """
        name = (self.proposal if self.setting == "fid" else None) or "uniform"
        error, _ = self._score_error(x, random, name, bypass)
        loss = 0.5 * error.mean() / x[0].numel()
        return loss, {"score": loss.detach()}

    def likelihood_weighted_loss(self, x: Tensor, random: StepRandom, bypass: bool = False) -> Loss:
        """The bound's score term, nats/dim, with latents detached; with soft truncation its integral over [tau, 1]."""
        error, weight = self._score_error(x, random, self.proposal or "importance", bypass)
        loss = (weight * error).mean() / x[0].numel()
        return loss, {"score": loss.detach()}

    def _score_error(self, x: Tensor, random: StepRandom, name: str, bypass: bool) -> tuple[Tensor, Tensor]:
        """(|noise_hat - noise|^2, the times' weights), each (B,); one truncation for the whole batch, if it is soft."""
        with torch.no_grad():
            z0 = self.encode(x, bypass=True)[0] if bypass else self.latent(x, random.source("score flow"))
        bounds = {}
        if self.soft_truncation is not None:
            u = torch.rand((), generator=random.generator("truncation", "cpu"), dtype=torch.float64)
            bounds["t_min"] = soft_truncation(float(u), self.sde.eps, self.soft_truncation)
        t, weight = PROPOSALS[name](self.sde, self._uniforms(random, x.dtype), **bounds)
        noise = random.normal("score noise", x.shape[1:], dtype=x.dtype)
        return squares(self.noise(self.perturb(z0, t, noise), t) - noise), weight

    # Sampling ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        n: int,
        steps: int = 100,
        sampler: str = "euler_maruyama",
        generator: Generator = None,
        end: float | None = None,
        **options: Any,
    ) -> Tensor:
        """n samples (n, *shape). ``self.nfe`` then holds the network evaluations a sample cost.

        With the samplers' option ``data_mean`` the prior's draws are moved by ``self.prior_mean``: see
        :func:`mean_latent`. ValueError where that is missing.
        """
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler = {sampler!r}: accepted are {', '.join(SAMPLERS)}")
        if not self.shape:
            raise ValueError("shape: missing; accepted: INDM(..., shape=(C, H, W)), the shape of one sample")
        like = next(self.parameters(), torch.zeros(()))
        z = self.sde.sample_prior((n, *self.shape), generator, like.device, like.dtype)
        if options.get("data_mean"):
            if self.prior_mean is None:
                raise ValueError(
                    "data_mean = True: prior_mean is missing; accepted: model.prior_mean = mean_latent(...)"
                )
            z, options = z + self.prior_mean.to(z), options | {"data_mean": False}
        z0, self.nfe = SAMPLERS[sampler](
            self.noise, self.sde, z, steps, generator, self.sde.eps if end is None else end, **options
        )
        return self.decode(z0, generator)

    @torch.no_grad()
    def trajectory(self, x: Tensor, times: Sequence[float], generator: Generator = None) -> Tensor:
        """x_t = h^{-1}(z_t) along one path of the forward SDE, (len(times), B, *shape); times increase from >= 0."""
        flow = calls.fixed(self.flow, x / self.scale, generator)  # the path begins at x
        z0 = calls.latent(flow, x / self.scale)
        path, z, earlier = [], z0, None
        for time in times:
            t = torch.full((len(x),), max(float(time), 0.0), dtype=x.dtype, device=x.device)
            if earlier is None:
                alpha, sigma = self.sde.marginal(t)
                mean, std = alpha, sigma if time > 0 else torch.zeros_like(sigma)
            else:
                mean, variance = self.sde.transition(earlier, t)
                std = variance.sqrt()
            z = expand(mean, z) * z + expand(std, z) * normal(z.shape, generator, z.device, z.dtype)
            path.append(calls.decode(flow, z) * self.scale)
            earlier = t
        return torch.stack(path)


@torch.no_grad()
def mean_latent(model: INDM, batches: Iterable[tuple[Tensor, Generator]]) -> Tensor:
    """E[z_1] = alpha(1) E[h(x)] over batches x (B, *shape), of shape (*shape): the official code's data_mean.

    ``model`` is in evaluation mode. With each batch comes the source of a global latent's draws, or None. ValueError
    without any sample.
    """
    total, count = 0.0, 0
    for x, generator in batches:
        total, count = total + model.latent(x, generator).double().sum(0), count + len(x)
    if not count:
        raise ValueError("batches: no sample; accepted: one or more batches (B, *shape)")
    # the official code pushes VP latents to t = 1 with noise, whose mean over all of them is zero
    alpha = model.sde.marginal(torch.ones((), dtype=torch.float64))[0]
    return (float(alpha) * total / count).to(next(model.parameters(), torch.zeros(())).dtype)
