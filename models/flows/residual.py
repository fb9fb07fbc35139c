"""Residual flow: a chain of invertible residual blocks x + g(x), Lip(g) < 1.

Chen et al. 2019, "Residual Flows" (arXiv:1906.02735); layers and sizes as INDM uses them (Na et al. 2022,
arXiv:2205.13699). No dimension is factored out: latent and data have one shape.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from models.flows import dense
from models.flows.inverse import invert
from models.flows.lipschitz import TWO_PI, Chain, constrain
from models.flows.log_det import ProbeKind, Roulette, RouletteKind, columns, draw_probe, log_det_from_columns, series
from models.flows.shapes import check_input, check_levels, three_layers
from models.options import Count, Fraction, Natural, Positive, require

LogDet = Literal["auto", "exact", "series"]

# "auto" computes the log-determinant exactly up to these dimensions, in training and in evaluation.
EXACT_TRAIN = 4
EXACT_EVAL = 256

# In training, so many parts of the batch have a roulette draw each: one draw for the whole batch would leave its noise
# undiminished by averaging, one for each sample would make many products with almost empty batches. In evaluation each
# sample has its own, so that samples' errors are their own.
ROULETTE_GROUPS = 8


class ResidualBlock(nn.Module):
    """The weights of g = A3 sin A2 sin A1 [sin]: convolutions 3x3, 1x1, 3x3 for images, linear maps for vectors.

    They are trained, averaged and stored as they are; each call of the flow caps them anew.
    """

    def __init__(self, channels: int, hidden: int, image: bool, preactivation: bool) -> None:
        super().__init__()
        self.preactivation = preactivation
        self.layers = three_layers(channels, hidden, channels, image)


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
        shape: Sequence[Count],
        blocks: Count | Sequence[Count] = (16, 16),
        hidden: Count = 512,
        coefficient: Fraction = 0.98,
        squeeze_first: bool = False,
        log_det: LogDet = "auto",
        terms_train: Natural = 2,
        terms_eval: Natural = 2,
        roulette: RouletteKind = "geometric",
        roulette_entry: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25,
        roulette_stay: Fraction = 0.9,
        roulette_rate: Positive = 2.0,
        probes: ProbeKind = "rademacher",
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
        law = self.roulette
        choices = (
            ("log_det", self.log_det, LogDet),
            ("roulette", law.kind, RouletteKind),
            ("probes", self.probes, ProbeKind),
        )
        for key, value, accepted in choices:
            require(value in get_args(accepted), key, value, f"are {', '.join(get_args(accepted))}")
        for key, value in (("coefficient", self.coefficient), ("roulette_stay", law.stay)):
            require(0 < value < 1, key, value, "is a number above 0 and below 1")
        require(0 < law.entry <= 1, "roulette_entry", law.entry, "is a number above 0 and up to 1")
        require(law.rate > 0, "roulette_rate", law.rate, "is a number above 0")
        require(hidden > 0, "hidden", hidden, "is a positive integer")
        for key, value in (("terms_train", self.terms[True]), ("terms_eval", self.terms[False])):
            require(value >= 0, key, value, "is 0 or a positive integer")
        check_levels(self.shape, "blocks", self.blocks, self.squeezes)
        image = len(self.shape) == 3
        require(image or not self.squeeze_first, "squeeze_first", True, "is False for vectors (shape [D])")

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
                    a = self._invert_block(chain, a, tolerance, max_iterations, number)
                if level:
                    a = F.pixel_shuffle(a, 2)
            a = F.pixel_shuffle(a, 2) if self.squeeze_first else a
            return a / TWO_PI

    def _invert_block(self, chain: Chain, goal: Tensor, tolerance: float, max_iterations: int, number: int) -> Tensor:
        """a with a + g(a) = goal, see `invert`."""
        return invert(chain, goal, tolerance, max_iterations, number, self.lipschitz)

    def enter(self, x: Tensor) -> Tensor:
        """Data or latent (B, *shape) -> the first block's variable a = 2 pi x, squeezed if the flow begins so.

        Between two levels a is squeezed once more (``pixel_unshuffle`` by 2). Raises ValueError for another shape.
        """
        check_input(x, self.shape)
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
