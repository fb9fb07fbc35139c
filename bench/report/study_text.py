"""The words of the studies: titles, what a table is about, what its columns are, captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bench.report.captions import data_words
from bench.report.cells import Row, Table
from bench.report.load import finite
from bench.report.tables import Grid

# agreement is what lies within this many standard errors (said in AGREEMENT below)
CLOSE = 3.0
# of bench.studies.gap_split, which imports torch; a test holds the two equal
RESIDUAL_DRAWS = 64
TITLES = {
    "gap_split": "The gap in two parts",
    "discretisation": "Where the distance of the samples comes from",
    "conventions": "The model and the ruler",
    "latents": "What the flow leaves to the diffusion",
    "identities": "Statements of the theory, checked",
}
INTROS = {
    "gap_split": (
        "NELBO and NLL speak of two processes: the bound is of the generative SDE, the NLL of the probability-flow "
        "ODE. On points of the plane the density of the SDE itself can be estimated, by an average over its paths, "
        "and then the gap falls into two parts. The variational part, from the NELBO to the SDE’s negative "
        "log-likelihood, is what the bound gives away: the smaller it is, the nearer training on the bound is to "
        "maximum likelihood. The SDE-to-ODE part is the difference between the two processes; it vanishes for an "
        "exact score and may have either sign: below zero, the ODE is the worse model of the two."
    ),
    "discretisation": (
        "The samples’ distance from the data in total variation (TV) is at most the sum of three terms: the prior’s "
        "(the forward diffusion ends near a Gaussian, not on it), the estimation’s (the score is learned, not "
        "exact) and the discretisation’s (the reverse process takes finitely many steps). The densities are known "
        "here, so that each is measured by itself. Only the last should fall as steps are added; where the samples "
        "do not improve any more, the other two are what is left."
    ),
    "conventions": (
        "Published likelihoods and sample scores were taken with conventions that shift the number without touching "
        "the model. Each row measures one of them on a trained model, twice: right, as this harness does it, and "
        "under the convention. The right column is the model; the difference is the ruler. A gap between two "
        "published numbers, one of which was taken under a convention, contains that difference whatever the models "
        "are."
    ),
    "latents": (
        "The diffusion does not see the data but z_0 = h(x), what the flow makes of them, and ends in z_T. Beside "
        "the moments and divergences of a standard Gaussian these numbers say how much of the work the flow has "
        "taken over. Without a flow, z_0 is the data."
    ),
    "identities": (
        "What theory proves, checked on the trained models: what was measured, what it should be where theory gives "
        "a number, and how many standard errors lie between."
    ),
}
HEADINGS = {
    "gap": "gap",
    "variational": "variational part",
    "sde_to_ode": "SDE-to-ODE part",
    "nelbo": "NELBO",
    "sde": "NLL of the SDE",
    "nll": "NLL of the ODE",
    "grid_change": "grid change",
    "chain_excess": "chain − limit",
    "ess": "effective paths",
    "tv": "TV",
    "floor": "TV of equal laws",
    "bound": "bound (their sum)",
    "slack": "bound − TV",
    "official": "under the convention",
    "closed_form": "closed form",
}
FIGURES = {
    "gap_split": (
        "The gap in two parts",
        "Filled circles: the variational part; hollow squares: the SDE-to-ODE part, left of zero where the ODE "
        "is the worse model; bars: their sum, the gap. Both parts are in the limit of a fine grid where two were "
        "measured. Whiskers are 95 % intervals over seeds.",
    ),
    "discretisation": (
        "Terms of the distance",
        "Above: total variation between samples and data (solid), the bound on it (dashed) and what two samples of "
        "one law would show (grey). Below: the discretisation term (solid), the estimation term (dotted) and the "
        "prior term (dash-dotted). Lines are means over seeds, bands 95 % intervals.",
    ),
    "conventions": (
        "What conventions add",
        "Difference that each convention makes to the number, with 95 % intervals over seeds; crosses are closed "
        "forms. The axis is linear about zero and logarithmic beyond.",
    ),
}
SPREAD = "Each number is the mean over seeds ± half its 95 % t interval; no ± where all seeds agree or there is one."
WITHIN = "SE: the standard error within runs, of the mean over seeds."
AGREEMENT = (
    "Agreement: the distance in standard errors, of the mean over seeds and of the worst seed; below 3 is agreement."
)
LATENTS = (
    "Mean norm: |E z| / √D; variance: mean over dimensions; eigenvalue spread: standard deviation of the logarithms "
    "of the covariance’s eigenvalues, 0 for a sphere, though few samples widen it; skewness and excess kurtosis: "
    "mean size over dimensions, 0 for a Gaussian. Divergences in nats a sample: kl gaussian, from the law of z to "
    "the Gaussian of its mean and covariance; kl gaussian change, the same minus the data’s, below 0 where the flow "
    "makes the data more Gaussian; kl prior, from the Gaussian of z_T’s moments to the prior."
)
IDENTITIES = (
    "special-case: largest difference between INDM without a flow and a linear diffusion written out by itself; "
    "dsm-is-elbo: likelihood-weighted score matching against the ELBO of the plug-in reverse SDE, in gradients and "
    "value; equivalent-sdes: members of the family of reverse SDEs against each other; debiased-time: logarithm of "
    "a ratio of variances, above 0 where the drawn times lower the variance of the bound."
)


def known_conventions(tables: Mapping[str, Table]) -> dict[str, dict[str, str]]:
    """Title, meaning and source of the conventions in the table; a convention nobody describes is known by its name."""
    try:
        from bench.conventions import CONVENTIONS as described
    except ImportError:
        described = {}
    rows = tables["conventions"].rows if "conventions" in tables else ()
    names = dict.fromkeys(row.keys["convention"] for row in rows if row.keys["convention"])
    made = {}
    for name in names:
        known = described[name] if name in described else None
        made[name] = {part: str(getattr(known, part, "") or "") for part in ("title", "meaning", "source")}
        made[name]["title"] = made[name]["title"] or name
    return made


def study_captions(tables: Mapping[str, Table], grid: Grid) -> dict[str, dict[str, str]]:
    """Study -> data set -> caption: data, sizes, units and how to read the columns."""
    made: dict[str, dict[str, str]] = {}
    for name, table in tables.items():
        made[name] = {}
        for dataset in dict.fromkeys(row.keys["dataset"] for row in table.rows):
            first = next((run for run in grid.of(dataset) if run.likelihood and not run.diverged), None)
            rows = [row for row in table.rows if row.keys["dataset"] == dataset]
            made[name][dataset] = " ".join((data_words(dataset, first), _reading(name, rows), SPREAD))
    return made


def _reading(name: str, rows: Sequence[Row]) -> str:
    def sizes(column: str) -> str:
        found = sorted({int(value) for row in rows if (value := finite(row.extra.get(column))) is not None})
        return " or ".join(f"{value:,}" for value in found) or "an unknown number of"

    if name == "gap_split":
        return _split_reading(rows, sizes)
    if name == "discretisation":
        return (
            f"In total variation, 0 to 1, over {sizes('samples')} samples of each law and a partition of the plane "
            f"into {sizes('bins')} cells. Two samples of one law of this size are the TV of equal laws apart: a TV "
            "near it is no distance, and the estimation and discretisation terms are not below it either, so the "
            "measured bound is above the true one. “Holds in” counts the seeds in which the measured TV exceeds the "
            "bound by no more than two of its standard errors. The measured shares obey the inequality by themselves "
            "up to the draws that A and B share, the fine reverse processes from the diffused data and from the "
            "prior, between which the prior term stands: the check guards the measurement and is no evidence by "
            f"itself. {WITHIN}"
        )
    if name == "conventions":
        return (
            f"Difference = under the convention − right, over the same n samples of the same model. {WITHIN} Every "
            "difference has one; the ± is the spread over seeds, which holds the difference between trained models "
            "too. The closed form is what theory says the difference should be, and “equal” means equal to 1e-6. "
            f"{AGREEMENT}"
        )
    if name == "latents":
        return f"Over the same n test samples for every variant. {LATENTS} {WITHIN}"
    return (
        f"{IDENTITIES} Difference = value − expected; blank where theory gives no number. {WITHIN} It is blank where "
        f"nothing was drawn at random: there “equal” means equal bit for bit. {AGREEMENT}"
    )


def _split_reading(rows: Sequence[Row], sizes: Callable[[str], str]) -> str:
    numbers = {finite(row.extra.get("grids")) for row in rows} - {None}
    limit = (
        f"NELBO and the NLL of the SDE are limits of a fine grid, 2 v(N) − v(N/2) for each point, from two grids that "
        f"share their paths, N = {sizes('steps')} steps. "
    )
    single = (
        f"NELBO and the NLL of the SDE are those of one grid of {sizes('steps')} steps, not limits of a fine grid. "
    )
    if numbers == {1, 2}:
        single = "Where “grid change” is not measured there was one grid, and they are those of that grid. "
    return (
        f"In nats. Every column is of the same {sizes('images')} test points, the first of the test set, so that the "
        "parts sum to the gap; it need not be the gap of all test points. "
        f"{'' if numbers == {1} else limit}{single if 1 in numbers else ''}"
        "The NLL of the SDE is minus the logarithm of an average of importance weights over "
        f"{sizes('paths')} paths a point, less the leading bias of that logarithm. Where few paths carry the weight it "
        "is still too high, and so the variational part too low and the SDE-to-ODE part too high by as much. The NLL "
        f"of the ODE is a mean over {RESIDUAL_DRAWS} draws of the residual at the first time, not the single draw of "
        "the table of likelihoods. Where the SDE-to-ODE part is negative, the ODE is the worse model: it gives these "
        "points less density than the SDE. That is what a negative NELBO − NLL means, for the variational part is not "
        "below zero. SE over images is that of one run and holds the noise of the paths, which every point draws "
        "anew; the weights are heavy-tailed, so that the SE of the paths, that of the finest grid, is often too "
        "small, and no error here rests on it. Checks: “grid change”, what the extrapolation changed in the NLL of "
        "the SDE, limit − finest grid; “chain − limit”, the bound of the finest grid’s chain minus its limit; "
        "“effective paths”, how many carry the weight on the finest grid, the median over points."
    )
