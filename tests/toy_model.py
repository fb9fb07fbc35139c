"""A model whose every number is known, for the tests of the harness."""

import math

import torch

from bench.settings import EvaluateConfig
from models.base import Model, NotDefined
from models.noise import normal

LEVELS, SIDE = 17, 2
SETTINGS = EvaluateConfig(nelbo_repeats=3, nelbo_times=4, batch_size=5, samples=8)


class Toy(Model):
    """A standard Gaussian: NLL in closed form, NELBO 0.5 nats above it, a chain's bound 1 nat above it with noise of
    unit variance, and the uniform law of grey levels. ``lacking``: quantity -> what it raises.
    """

    curve_sampler = "toy"

    def __init__(self, shape=(1, SIDE, SIDE), lacking=None, chain=7):
        super().__init__()
        self.shape, self.lacking, self.calls = shape, lacking or {}, []
        self.chain = range(chain) if chain else None

    def _called(self, name):
        self.calls.append(name)
        if name in self.lacking:
            raise self.lacking[name]

    def _energy(self, x):
        return 0.5 * (x.flatten(1).square().sum(1) + x[0].numel() * math.log(2 * math.pi))

    def phases(self):
        return []

    def nelbo_parts(self, x, times=1, generator=None):
        self._called("nelbo")
        return {"prior": self._energy(x), "diffusion": torch.full((len(x),), 0.5)}

    def nll_parts(self, x, rtol=1e-5, atol=1e-5, probes=1, corrected=True, generator=None):
        self._called("nll")
        return {"prior": self._energy(x), "nfe": torch.full((len(x),), 9.0)}

    def chain_parts(self, x, generator=None):
        self._called("chain")
        return {"prior": self._energy(x), "diffusion": 1.0 + normal((len(x),), generator, x.device, x.dtype)}

    def discrete_parts(self, levels, count, generator=None):
        self._called("discrete")
        assert levels.dtype == torch.uint8 and int(levels.max()) < count  # images as they are, no noise on them
        return {"prior": torch.full((len(levels),), levels[0].numel() * math.log(count))}

    def sample(self, n, steps, sampler, generator=None, **options):
        self._called(f"sample {sampler}")
        if sampler != "toy":
            raise NotDefined(f"not defined: no {sampler} here")
        self.nfe = steps
        return normal((n, *self.shape), generator)

    def trajectory(self, x, times, generator=None):
        return torch.stack([x] * len(times))
