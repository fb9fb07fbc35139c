"""The claims of the variational perspective on diffusion models, about the linear diffusion, with their tests."""

from __future__ import annotations

from bench.claims import readings as r
from bench.claims.definition import CHECK, OWN, PAIRED, RUNS, Claim, Test, equal
from bench.claims.wording import HIGHER, ITSELF, LINEAR, LOWER
from bench.report.load import LIKELIHOOD

HUANG = "Huang, Lim and Courville 2021 (arXiv 2106.02808)"
# with VE, time drawn uniformly is the importance density already
LINEAR_VP = ("ddpmpp-vp", "ddpmpp-subvp", "sdeflow-uniform")

# the papers' estimator of the bound, one draw a term; the study also has ones of lower variance
DRAWN = ("log_variance_ratio_uniform_over_debiased", "log_variance_ratio_uniform_over_importance")

# sampling noise is no excuse beyond this, in the quantity's own unit: nats, bits/dim, share of a squared norm
RESOLUTION = 0.05
ROUNDING = 1e-6
EQUAL_RULE = (
    f"supported where the mean difference over runs is within four of its standard errors of 0 and these four are at "
    f"most {RESOLUTION:g}, contradicted where it is beyond four (and beyond {ROUNDING:g}), else inconclusive; no p"
)


def identity(claim: str, pattern: str, noun: str, units: str = "", caveat: str = "") -> Test:
    """A quantity of identities.csv must be what is expected, to within its error."""
    return Test(
        kind=CHECK,
        noun=noun,
        statistic="{quantity}, measured minus expected",
        side="equal",
        needs=("identities.csv",),
        value=r.identity_difference(claim),
        error=r.identity_error(claim),
        points=r.identities(claim, pattern),
        decide=equal(ROUNDING, RESOLUTION),
        rule=EQUAL_RULE,
        pairing=ITSELF,
        variants=LINEAR,
        protocols=("study",),
        study="identities",
        units=units,
        unit=RUNS,
        caveat=caveat,
    )


CLAIMS = (
    Claim(
        "dsm-is-elbo",
        "Score matching is the ELBO",
        "The likelihood-weighted score-matching loss is the ELBO of the plug-in reverse SDE up to a constant.",
        HUANG,
        (
            identity("dsm-is-elbo", "gradient_*", "squared difference of the two gradients, as a share of their own"),
            identity("dsm-is-elbo", "bound_*", "difference of the two forms of the bound", "data"),
        ),
    ),
    Claim(
        "equivalent-sdes",
        "A family of equivalent SDEs",
        "The lambda-family of plug-in reverse SDEs shares marginals; lambda = 1 is a continuous normalizing flow.",
        HUANG,
        (
            identity(
                "equivalent-sdes",
                "energy_*",
                "squared energy distance between two members, beyond that of two samples of one",
                caveat="the members share marginals where the score is exact; this one is learned",
            ),
            identity("equivalent-sdes", "cnf_*", "CNF likelihood against the ODE's NLL", "data"),
        ),
    ),
    Claim(
        "debiased-time",
        "Non-uniform time",
        "Non-uniform time sampling lowers the variance of the bound and helps training.",
        HUANG,
        (
            Test(
                kind=OWN,
                noun="{quantity}",
                statistic="{quantity}: log of the bound's one-draw variance under uniform time over that under "
                "this one",
                side="positive",
                needs=("identities.csv",),
                value=r.identity_difference("debiased-time"),
                points=r.identities("debiased-time", *DRAWN),
                pairing="both ways of drawing time on one run, from the same images",
                variants=LINEAR_VP,
                protocols=("study",),
                study="identities",
                below="{ours}: drawing time uniformly has the smaller variance, {noun} is {size} below zero",
                above="{ours}: drawing time uniformly has the larger variance, {noun} is {size} above zero",
            ),
            Test(
                kind=PAIRED,
                noun="test NELBO",
                statistic="test NELBO at the end of training, residual included",
                side="negative",
                needs=(LIKELIHOOD,),
                value=r.bound("nelbo"),
                per_image="nelbo",
                pairs=(("sdeflow-debiased", "sdeflow-uniform"),),
                pairing="training with debiased and with uniform time, of the same seed",
                protocols=("likelihood", "budget"),
                units="data",
                below=LOWER,
                above=HIGHER,
            ),
        ),
    ),
)
