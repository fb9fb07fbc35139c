"""The settings of a run: how it is trained and how it is evaluated. Each field is a key of a suite's YAML."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bench.options import Schema

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]

Metric = Literal["fd", "kid", "precision_recall", "sliced_wasserstein", "energy"]

# the kinds of parameters that a model's phases may have, with the AdamW learning rates of the paper's CIFAR-10 runs
# (INDM, DiffFlow) for those that a configuration leaves out
LEARNING_RATES = {"score": 2e-4, "drift": 2e-4, "flow": 1e-3}
# dimensions of the features: a Frechet distance of fewer images has a singular covariance
FEATURE_DIMS = {"classifier": 32, "inception": 2048}
IMAGE_QUALITY = ("fd", "kid", "precision_recall")
POINT_QUALITY = ("sliced_wasserstein", "energy")


class TrainConfig(Schema):
    """How a run is trained.

    ``steps`` optimiser steps of ``batch_size`` images; ``learning_rates`` by parameter group (AdamW; ``LEARNING_RATES``
    names them and fills in what is left out); ``warmup`` steps of linear learning-rate growth; ``ema`` the decay of the
    weights' moving average; ``clip`` the norm of each group's gradient (null: no clipping). The learning curve has
    ``curve`` points, evenly spaced in log(images), each measured on ``curve_images`` test images and ``curve_samples``
    samples (0: no sample quality) drawn with ``curve_steps`` steps. ``checkpoint_every`` counts steps.

    ``ema_rates``: decays of single parameter groups, in place of ``ema``. ``raw_groups``: parameter groups that are
    measured, and saved as the run's weights, as the last step left them, not averaged; the official INDM does so with
    the flow. ``mixed_precision`` "bf16": networks in bfloat16; losses, log-determinants, weights and their averages
    stay float32, and so does everything that is measured. ``tf32``: float32 products of the training on a GPU keep 10
    bits of mantissa. ``memory_format`` of weights and images. ``compile``: networks through torch.compile.
    """

    batch_size: Count
    steps: Count
    warmup: Natural = 0
    ema: Decay = 0.999
    learning_rates: dict[str, Positive] = Field(default_factory=dict)
    clip: Positive | None = 1.0
    weight_decay: NonNegative = 0.0
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    mixed_precision: Literal["no", "bf16"] = "no"
    schedule: Literal["constant", "cosine"] = "constant"
    curve: Natural = 8
    curve_images: Count = 256
    curve_samples: Natural = 0
    curve_steps: Count = 32
    checkpoint_every: Count = 1000
    horizontal_flip: bool = False
    ema_rates: dict[str, Decay] = Field(default_factory=dict)
    raw_groups: list[str] = Field(default_factory=list)
    tf32: bool = False
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    compile: bool = False

    @property
    def measured_weights(self) -> str:
        """Which weights are saved and measured, for the tables: "ema", or for example "ema, raw flow"."""
        return ", ".join(["ema", *(f"raw {group}" for group in sorted(self.raw_groups))])


class SamplerConfig(Schema):
    """One sampler of the robustness table at several numbers of steps (none for an adaptive one, resolved to [0]).

    The sampler's own options stand beside these keys.
    """

    name: str
    steps: list[Count] = Field(default_factory=list)


class EvaluateConfig(Schema):
    """What is measured on a trained run.

    ``images``: test images used (null: all). NELBO: ``nelbo_repeats`` independent estimates of ``nelbo_times`` time
    draws an image. NLL: the ODE ``solver`` (models.integrators.likelihood_path) and its tolerances, ``probes`` of
    the divergence ("exact" or a number of Hutchinson probes). ``samplers``: rows of the robustness table, each with
    ``samples`` samples judged by ``quality``. Images are compared through ``features``: a classifier trained on the
    run's own data set, or Inception. ``batch_size``: images that a GPU handles at once; ``likelihood_batch_size``
    (null: as many) of those whose likelihood is computed, which takes the memory of gradients. ``studies``: further
    measurements by name, each with its own settings (see :mod:`bench.studies`).
    """

    images: Count | None = None
    nelbo_repeats: Annotated[int, Field(ge=2)] = 3
    nelbo_times: Count = 16
    rtol: Positive = 1e-5
    atol: Positive = 1e-5
    probes: Literal["exact"] | Count = "exact"
    solver: Literal["dopri5", "adams"] = "dopri5"
    samplers: list[dict] = Field(default_factory=list)
    samples: Count = 1024
    quality: list[Metric] = Field(default_factory=list)
    features: Literal["classifier", "inception"] | None = None
    batch_size: Count = 256
    likelihood_batch_size: Count | None = None
    studies: dict[str, dict | None] = Field(default_factory=dict)
