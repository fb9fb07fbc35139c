"""Cases for the tests of conventions: exact Gaussian models, flows before them, small image data."""

from types import SimpleNamespace

import torch
from analytic import gaussian_model

from bench.conventions import CONVENTIONS
from bench.conventions.case import Case
from bench.data import make_dataset
from bench.studies import Context
from bench.studies.conventions import conduct
from models.indm import INDM
from models.sde import VPSDE

DIMS = 3


def settings(**options):
    defaults = {"images": None, "rtol": 1e-6, "atol": 1e-6, "probes": "exact", "batch_size": 64, "features": None}
    return SimpleNamespace(**(defaults | options))


def case_of(model, data, raw=None, features_file=None, evaluate=None, **options):
    run = SimpleNamespace(seed=0, evaluate=evaluate or settings(), features_file=features_file)
    context = Context(model, run, data, torch.device("cpu"))
    object.__setattr__(context, "raw_model", lambda: raw)
    return Case(context, **({"images": 200, "times": 8, "samples": 64} | options))


def gaussian_points(count=400, std=0.5, mean=0.0, dims=DIMS):
    x = mean + std * torch.randn(count, dims, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return make_dataset("gaussian", None, x, x)


def rows_of(name, case):
    return {row["quantity"]: row for row in conduct(CONVENTIONS[name], case)}


def assert_agrees(row, value=None, least=0.0):
    """The difference against a known value, or against the row's closed form by the paired error that it states."""
    error = row["closed_form_se"] if value is None else row["se"]
    value = row["closed_form"] if value is None else value
    assert abs(row["difference"] - value) < 4 * error + least, row


def flow_model(flow, sde=None, **options):
    base = gaussian_model(sde or VPSDE(), 2, 0.0, 0.7)
    return INDM(base.sde, base.score, flow, shape=(2,), **options)


def gaussian_images(levels=17, std=0.3, count=400):
    """Images that are a quantised Gaussian, and the exact model of the Gaussian itself."""
    x = std * torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    images = ((x + 1) * levels / 2).floor().clamp(0, levels - 1).to(torch.uint8)
    return make_dataset("images", levels, images, images)


class ImageScore(torch.nn.Module):
    """Exact score of N(0, std^2 I) images."""

    def __init__(self, sde, std):
        super().__init__()
        self.sde, self.std = sde, std

    def forward(self, z, t):
        alpha, sigma = (v.view(-1, 1, 1, 1) for v in self.sde.marginal(t))
        return -z / ((alpha * self.std) ** 2 + sigma**2)
