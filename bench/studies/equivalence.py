"""Claim equivalent-sdes: the members of the plug-in reverse family share their marginals, and the last is a CNF."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.studies import Context
from bench.studies.resampling import combine, mean_and_error
from models.noise import IndexedGenerator
from models.variational import negative_elbo, rademacher_probes, sample_member

WEIGHTS = (0.5, 1.0)
GROUPS = 10
TOLERANCE = 1e-5  # of the adaptive solver that the fixed-step one is compared with
MARGINALS = tuple(f"energy_sde_{weight:g}{place}" for place in ("", "_midway") for weight in WEIGHTS)
LIKELIHOODS = ("cnf_likelihood", "elbo_sde_0", "elbo_sde_0.5")
QUANTITIES = (*MARGINALS, *LIKELIHOODS)
Found = dict[str, tuple[float, float | None, float, int]]  # value, expected, error, n


@dataclass(frozen=True)
class Settings:
    """``samples`` a member in ``steps`` steps; likelihoods of ``images`` images in ``likelihood_steps`` steps."""

    samples: int
    steps: int
    images: int
    likelihood_steps: int


@torch.no_grad()
def marginals(context: Context, settings: Settings) -> Found:
    """Distances between the members' samples, in latent space, halfway and at the end."""
    model, seed, middle = context.model, context.run.seed, settings.steps // 2
    index = torch.arange(settings.samples - settings.samples % GROUPS, device=context.device)

    def states(weight: float, purpose: str) -> list[Tensor]:
        source = IndexedGenerator(seed, f"identities family {purpose}", index)
        like = next(model.parameters(), torch.zeros(()))
        z = model.sde.sample_prior((len(index), *context.data.shape), source, like.device, like.dtype)
        z, kept = sample_member(model.noise, model.sde, z, weight, settings.steps, source, at=(middle,))
        return [s.flatten(1).double() for s in (z, *kept)]

    first, again = states(0.0, "0"), states(0.0, "0 again")
    others = {weight: states(weight, f"{weight:g}") for weight in WEIGHTS}
    found: Found = {}
    for k, place in enumerate(("", "_midway")):
        floor = EnergyDistance(first[k], again[k], GROUPS)
        for weight, other in others.items():
            distance = EnergyDistance(first[k], other[k], GROUPS)
            # the two distances share a sample: leave the same groups out of both; where the laws agree the error
            # is too large by up to a root of two
            error = combine(distance.value() - floor.value(), distance.without() - floor.without()).se
            found[f"energy_sde_{weight:g}{place}"] = distance.value(), floor.value(), error, len(index)
    return found


class EnergyDistance:
    """The unbiased squared energy distance of x and y (n, D), and the same without each of ``groups`` groups of both.

    As :func:`bench.distances.energy_distance`, from sums of distances between groups. ``groups`` must divide n.
    """

    def __init__(self, x: Tensor, y: Tensor, groups: int):
        self.size = len(x) // groups
        self.between, self.of_x, self.of_y = (self._sums(a, b, groups) for a, b in ((x, y), (x, x), (y, y)))

    def _sums(self, x: Tensor, y: Tensor, groups: int) -> Tensor:
        matrix = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        return matrix.view(groups, self.size, groups, self.size).sum((1, 3)).cpu()

    def _distance(self, kept: Tensor) -> float:
        n = self.size * int(kept.sum())
        between, of_x, of_y = (float(s[kept][:, kept].sum()) for s in (self.between, self.of_x, self.of_y))
        return 2 * between / n**2 - (of_x + of_y) / (n * (n - 1))

    def value(self) -> float:
        """The distance of the whole samples."""
        return self._distance(torch.ones(len(self.between), dtype=torch.bool))

    def without(self) -> Tensor:
        """The distances (groups,) of the samples without one group each."""
        return torch.tensor([self._distance(~row) for row in torch.eye(len(self.between), dtype=torch.bool)])


def likelihoods(context: Context, settings: Settings) -> Found:
    """The members' bounds against the last one's likelihood, and that against the model's own ODE likelihood; nats.

    In float64, as what is compared are solvers. Divergences are exact or share their probes, as the run's do.
    """
    model = copy.deepcopy(context.model).double().eval().requires_grad_(False)
    x = context.points(settings.images).double()
    index = torch.arange(len(x), device=x.device)
    probes = context.run.evaluate.probes

    def source() -> IndexedGenerator:
        return IndexedGenerator(context.run.seed, "identities likelihood", index)

    parts = model.nll_parts(x, TOLERANCE, TOLERANCE, probes, corrected=False, generator=source())
    adaptive = parts["prior"] + parts["ode"]

    generator = source()  # the same draws in the same order, so that both solvers see the same probes
    with torch.no_grad():
        z0 = model.encode(x, generator)[0]
    vectors = None if probes == "exact" else rademacher_probes(probes, z0, generator)

    def bound(weight: float, steps: int) -> Tensor:
        return negative_elbo(model.noise, model.sde, z0, weight, steps, generator, vectors)

    fine = bound(1.0, settings.likelihood_steps)
    value, se = mean_and_error(fine - adaptive)
    halved = float((bound(1.0, settings.likelihood_steps // 2) - fine).mean())
    found: Found = {"cnf_likelihood": (value, 0.0, (se**2 + halved**2) ** 0.5, len(x))}
    for name, weight in (("elbo_sde_0", 0.0), ("elbo_sde_0.5", 0.5)):
        value, se = mean_and_error(bound(weight, settings.likelihood_steps) - fine)
        found[name] = value, None, se, len(x)
    return found


PARTS: tuple[tuple[tuple[str, ...], Callable[[Context, Settings], Found]], ...] = (
    (MARGINALS, marginals),
    (LIKELIHOODS, likelihoods),
)
