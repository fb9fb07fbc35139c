"""Residual flow: a chain of invertible residual blocks x + g(x), Lip(g) < 1.

Chen et al. 2019, "Residual Flows" (arXiv:1906.02735); layers and sizes as INDM uses them (Na et al. 2022,
arXiv:2205.13699). No dimension is factored out: latent and data have one shape.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from models.flows import dense
from models.flows.inverse import invert
from models.flows.lipschitz import TWO_PI, Chain, constrain
from models.flows.log_det import Roulette, columns, draw_probe, log_det_from_columns, series

# "auto" computes the log-determinant exactly up to these dimensions, in training and in evaluation.
EXACT_TRAIN = 4
EXACT_EVAL = 256

# In training, so many parts of the batch have a roulette draw each: one draw for the whole batch would leave its noise
# undiminished by averaging, one for each sample would make many products with almost empty batches. In evaluation each
# sample has its own, so that samples' errors are their own.
ROULETTE_GROUPS = 8

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]


class ResidualBlock(nn.Module):
    """The weights of g = A3 sin A2 sin A1 [sin]: convolutions 3x3, 1x1, 3x3 for images, linear maps for vectors.

    They are trained, averaged and stored as they are; each call of the flow caps them anew.
    """

    def __init__(self, channels: int, hidden: int, image: bool, preactivation: bool) -> None:
        super().__init__()
        self.preactivation = preactivation
        sizes = ((channels, hidden, 3), (hidden, hidden, 1), (hidden, channels, 3))
        self.layers = nn.ModuleList(
            nn.Conv2d(i, o, kernel, padding=kernel // 2) if image else nn.Linear(i, o) for i, o, kernel in sizes
        )


class ResidualFlow(nn.Module):
    """Invertible map h = squeeze and residual blocks y = x + g(x), data and latent of one shape.

    Images (C, H, W): `blocks[0]` blocks at (C, H, W), a 2x2 squeeze (pixel (2h+i, 2w+j) of channel c becomes channel
    4c+2i+j), `blocks[1]` blocks at (4C, H/2, W/2), and so on; in the end all squeezes are undone. `squeeze_first`
    squeezes once before the first block (CelebA). Vectors (D,): one count of blocks. g has `hidden` channels and three
    layers whose infinity norms are capped at `coefficient`, so Lip(g) <= coefficient^3. The defaults are the paper's
    for CIFAR-10.

    With PyTorch's default initialisation every layer sits at the cap, and yet the flow starts close to the identity:
    the cap is on the sum of absolute values while the signs are random, so a block's Jacobian has spectral norm 0.01
    (2-D, 64 hidden), 0.005 (8x8, 32 hidden) or less, and the log-determinant is some hundredths of a nat.

    log_det: "exact" builds each block's Jacobian; "series" is the unbiased estimate with random depth and probe;
    "auto" is exact up to 4 dimensions in training and 256 in evaluation. `terms_train` and `terms_eval` are the
    numbers of terms before the roulette, `roulette*` its distribution (see `log_det.Roulette`; the official code's is
    "poisson" with rate 2, 20 terms in evaluation, and gaussian probes; reports/estimators holds them against these).

    Under autocast, training on images follows it; evaluation and inversion run in the dtype of the weights, since
    rounding to 8 bits would break their agreement.

    Raises ValueError on a combination that cannot be built.
    """

    def __init__(
        self,
        shape: Sequence[PositiveInt],
        blocks: PositiveInt | Sequence[PositiveInt] = (16, 16),
        hidden: PositiveInt = 512,
        coefficient: Fraction = 0.98,
        squeeze_first: bool = False,
        log_det: Literal["auto", "exact", "series"] = "auto",
        terms_train: Annotated[int, Field(ge=0)] = 2,
        terms_eval: Annotated[int, Field(ge=0)] = 2,
        roulette: Literal["geometric", "poisson"] = "geometric",
        roulette_entry: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25,
        roulette_stay: Fraction = 0.9,
        roulette_rate: Annotated[float, Field(gt=0.0)] = 2.0,
        probes: Literal["rademacher", "gaussian"] = "rademacher",
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.blocks = (blocks,) if isinstance(blocks, int) else tuple(blocks)
        self.coefficient = coefficient
        self.squeeze_first = squeeze_first
        self.log_det = log_det
        self.terms = {True: terms_train, False: terms_eval}
        self.roulette = Roulette(roulette, roulette_entry, roulette_stay, roulette_rate)
        self.probes = probes
        self._check(hidden)

        image = len(self.shape) == 3
        channels = self.shape[0] * (4 if squeeze_first else 1)
        self.levels = nn.ModuleList()
        for level, count in enumerate(self.blocks):
            self.levels.append(
                nn.ModuleList(
                    ResidualBlock(channels, hidden, image, preactivation=level + index > 0) for index in range(count)
                )
            )
            channels *= 4

    def _check(self, hidden: int) -> None:
        options = {
            "log_det": (self.log_det, ("auto", "exact", "series")),
            "roulette": (self.roulette.kind, ("geometric", "poisson")),
            "probes": (self.probes, ("rademacher", "gaussian")),
        }
        for key, (value, accepted) in options.items():
            if value not in accepted:
                raise ValueError(f"{key}: {value!r} is not one of {', '.join(accepted)}")
        for key, value in (("coefficient", self.coefficient), ("roulette_stay", self.roulette.stay)):
            if not 0 < value < 1:
                raise ValueError(f"{key}: {value!r} must be greater than 0 and less than 1")
        if not 0 < self.roulette.entry <= 1:
            raise ValueError(f"roulette_entry: {self.roulette.entry!r} must be greater than 0 and at most 1")
        if not self.roulette.rate > 0:
            raise ValueError(f"roulette_rate: {self.roulette.rate!r} must be greater than 0")
        if hidden < 1:
            raise ValueError(f"hidden: {hidden!r} must be at least 1")
        if min(self.terms.values()) < 0:
            raise ValueError(f"terms_train, terms_eval: {tuple(self.terms.values())!r} must be at least 0")
        if len(self.shape) not in (1, 3) or min(self.shape) < 1:
            raise ValueError(f"shape: {list(self.shape)!r} is neither [D] nor [C, H, W]")
        if not self.blocks or min(self.blocks) < 1:
            raise ValueError(f"blocks: {list(self.blocks)!r} must be one or more counts, each at least 1")
        if len(self.shape) == 1:
            if len(self.blocks) > 1:
                raise ValueError(f"blocks: {list(self.blocks)!r} must be a single count for vectors (shape [D])")
            if self.squeeze_first:
                raise ValueError("squeeze_first: True is for images (shape [C, H, W]) only")
        elif any(size % 2**self.squeezes for size in self.shape[1:]):
            raise ValueError(
                f"blocks: {list(self.blocks)!r} with squeeze_first {self.squeeze_first} squeezes {self.squeezes} times "
                f"and needs height and width divisible by {2**self.squeezes}, not shape {list(self.shape)!r}"
            )

    @property
    def lipschitz(self) -> float:
        """Bound of every block's branch g in the infinity norm, coefficient^3: three capped layers, sines between."""
        return self.coefficient**3

    @property
    def squeezes(self) -> int:
        """How many times the image is squeezed in all."""
        return len(self.blocks) - 1 + int(self.squeeze_first)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """x (B, *shape) -> z (B, *shape) and log|det dz/dx| (B,) in nats.

        By the series, the value is an unbiased estimate and so is the gradient; the randomness comes from `generator`,
        on the CPU or on x's device (None: PyTorch's global one). Training and evaluation mode differ in the number of
        terms and in what "auto" means.
        """
        dims = math.prod(self.shape)
        is_exact = self.log_det == "exact" or (
            self.log_det == "auto" and dims <= (EXACT_TRAIN if self.training else EXACT_EVAL)
        )
        with self._autocast(x):
            a = self.enter(x)
            terms: list[Tensor] = []
            for level, chains in enumerate(self.chains()):
                if level:
                    a = F.pixel_unshuffle(a, 2)
                for chain in chains:
                    if is_exact and len(self.shape) == 1 and dims <= dense.MAX_DIMS:
                        # Such small matrices wait and are done in one batch after the last block.
                        change, term = dense.value_and_columns(chain, a)
                    elif is_exact:
                        change, jacobian = chain.linearise(a)
                        term = log_det_from_columns(columns(jacobian, a))
                    else:
                        groups = ROULETTE_GROUPS if self.training else len(a)
                        depth = self.roulette.draw(len(a), groups, generator)
                        probe = draw_probe(self.probes, a, generator)
                        change, term = self._estimate(chain, a, probe, depth)
                    a = a + change
                    terms.append(term)
            total = torch.stack(terms)
            if total.ndim == 4:
                total = log_det_from_columns(total)
            return self._leave(a), total.sum(0)

    def _estimate(self, chain: Chain, a: Tensor, probe: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        """g(a) and the series' estimate of log|det(I + J)|."""
        change, jacobian = chain.linearise(a)
        return change, series(jacobian, probe, depth, self.terms[self.training], self.roulette)

    def latent(self, x: Tensor) -> Tensor:
        """z alone, for steps that need no log-determinant: a third of the work, no random numbers."""
        with self._autocast(x):
            a = self.enter(x)
            for level, chains in enumerate(self.chains()):
                if level:
                    a = F.pixel_unshuffle(a, 2)
                for chain in chains:
                    a = a + chain.value(a)
            return self._leave(a)

    @torch.no_grad()
    def inverse(self, z: Tensor, tolerance: float | None = None, max_iterations: int = 1000) -> Tensor:
        """z (B, *shape) -> x with h(x) = z, by an accelerated fixed point for each block; no gradient.

        A sample is done when its largest residual |x + g(x) - z| is at most `tolerance` * (1 + max|x|), which bounds
        the error by 1 / (1 - Lip(g)) times that and, after the acceleration, is usually far above it. Default
        tolerance: 1e-6 in float32, 1e-12 in float64; less than rounding allows (8 machine epsilons) is raised to that.

        The map may contract by 1 - Lip(g) = 0.06 in each block: what x loses when z is rounded no inverse brings back.

        Raises FlowInverseError if a block has samples left after `max_iterations`, or a sample is not finite.
        """
        with torch.autocast(z.device.type, enabled=False):
            a = self.enter(z)
            if tolerance is None:
                tolerance = 1e-12 if a.dtype == torch.float64 else 1e-6
            tolerance = max(tolerance, 8 * torch.finfo(a.dtype).eps)
            for _ in self.blocks[1:]:
                a = F.pixel_unshuffle(a, 2)
            number = sum(self.blocks)
            for level, chains in reversed(list(enumerate(self.chains()))):
                for chain in reversed(chains):
                    number -= 1
                    a = invert(chain, a, tolerance, max_iterations, number, self.lipschitz)
                if level:
                    a = F.pixel_shuffle(a, 2)
            a = F.pixel_shuffle(a, 2) if self.squeeze_first else a
            return a / TWO_PI

    def enter(self, x: Tensor) -> Tensor:
        """Data or latent (B, *shape) -> the first block's variable a = 2 pi x, squeezed if the flow begins so.

        Between two levels a is squeezed once more (``pixel_unshuffle`` by 2). Raises ValueError for another shape.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x: shape {list(x.shape)} is not (B, {', '.join(map(str, self.shape))})")
        a = x * TWO_PI
        return F.pixel_unshuffle(a, 2) if self.squeeze_first else a

    def _leave(self, a: Tensor) -> Tensor:
        for _ in range(self.squeezes):
            a = F.pixel_shuffle(a, 2)
        return a / TWO_PI

    def chains(self) -> Iterator[list[Chain]]:
        """The residual branches g of each level's blocks, from the data's side, with the capped weights of this call.

        A block is a -> a + g(a) in the variable of :meth:`enter`; Lip(g) <= ``lipschitz`` in the largest entry.
        """
        for level in self.levels:
            columns = [constrain([block.layers[i] for block in level], self.coefficient) for i in range(3)]
            rows = zip(*columns, strict=True)
            yield [Chain(row, block.preactivation) for row, block in zip(rows, level, strict=True)]

    def _autocast(self, x: Tensor) -> torch.autocast:
        device = x.device.type
        enabled = self.training and len(self.shape) == 3 and torch.is_autocast_enabled(device)
        return torch.autocast(device, enabled=enabled)
