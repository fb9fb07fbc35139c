"""The claims of INDM, each with the tests that decide on it, and one question of this harness's own.

Statements are the paper's words as far as they could be read (abstract and slides).
"""

from __future__ import annotations

from bench.claims import readings as r
from bench.claims.definition import BY_SEED, CHECK, HARNESS, OWN, PAIRED, RUNS, Claim, Test, equal, never_negative
from bench.claims.wording import HIGHER, ITSELF, LARGER, LINEAR, LOWER, SMALLER
from bench.report.load import CURVE, LIKELIHOOD, ROBUSTNESS

INDM = "INDM, Kim et al., NeurIPS 2022 (arXiv 2205.13699)"
OPEN = f"{INDM}, listed as open"

# FID, lower is better, by (data set, variant), as in reports/reference.csv: the abstract's INDM on CelebA, which names
# no configuration and stands for the one of the FID setting; a leaderboard's INDM (VE, FID) there, INDM (FID) on
# CIFAR-10
PUBLISHED_FID = {
    ("celeba64", "indm-vp-fid"): 1.75,
    ("celeba64", "indm-ve"): 2.54,
    ("cifar10", "indm-vp-fid"): 2.28,
}

EXACT_RULE = "supported where the difference is exactly 0 in every run, contradicted where it is not in any; no p"
BOUND_RULE = "supported where it is not negative in any run, contradicted where it is in one; no p"

CLAIMS = (
    Claim(
        "fast-training",
        "Faster training",
        "The learning curve of INDM is strictly under that of DDPM++.",
        f"{INDM}, quoted",
        (
            Test(
                kind=PAIRED,
                noun="mean height of the learning curve",
                statistic="area under the test-NELBO curve over log(step), first 10 % left out, over its width",
                side="negative",
                needs=(CURVE,),
                value=r.curve_area(r.curve_nelbo),
                protocols=("curve", "budget"),
                units="data",
                below="{ours}'s learning curve lies {size} below {theirs}'s",
                above="{ours}'s learning curve lies {size} above {theirs}'s",
            ),
        ),
    ),
    Claim(
        "mle-training",
        "Nearly maximum likelihood",
        "INDM training is nearly MLE: NELBO and NLL almost coincide, unlike DDPM++.",
        INDM,
        (
            Test(
                kind=PAIRED,
                noun="gap |NELBO − NLL| at the end",
                statistic="|NELBO − NLL| on the test images at the end of training, residual included",
                side="negative",
                needs=(LIKELIHOOD,),
                value=r.gap_at_the_end,
                protocols=("likelihood", "budget"),
                units="data",
                below=SMALLER,
                above=LARGER,
            ),
            Test(
                kind=PAIRED,
                noun="mean gap |NELBO − NLL| along the learning curve",
                statistic="area under |NELBO − NLL| of the learning curve over log(step), first 10 % left out, "
                "over its width",
                side="negative",
                needs=(CURVE,),
                value=r.curve_area(r.curve_gap),
                protocols=("curve", "budget"),
                units="data",
                below=SMALLER,
                above=LARGER,
            ),
        ),
    ),
    Claim(
        "better-nll",
        "Better likelihood",
        "INDM reaches lower NLL at equal budget.",
        INDM,
        (
            Test(
                kind=PAIRED,
                noun="test NLL",
                statistic="test NLL at the end of training, residual included",
                side="negative",
                needs=(LIKELIHOOD,),
                value=r.bound("nll"),
                per_image="nll",
                protocols=("likelihood", "budget"),
                units="data",
                below=LOWER,
                above=HIGHER,
            ),
        ),
    ),
    Claim(
        "robust-sampling",
        "Robust against few steps",
        "The sample quality of INDM is robust on the number of discretization steps.",
        f"{INDM}, quoted",
        (
            Test(
                kind=PAIRED,
                noun="slope of log({distance}) against log(steps) of {sampler}",
                statistic="slope of log({distance}) against log(steps), step counts below the largest",
                side="positive",
                needs=(ROBUSTNESS,),
                value=r.step_slope,
                points=r.sweeps,
                protocols=("robustness", "budget"),
                below="With fewer steps of {sampler} the {distance} of {ours}'s samples grows faster than that of "
                "{theirs}: the slopes of its logarithm against log(steps) differ by {size}",
                above="With fewer steps of {sampler} the {distance} of {ours}'s samples grows more slowly than that of "
                "{theirs}: the slopes of its logarithm against log(steps) differ by {size}",
            ),
        ),
    ),
    Claim(
        "discretisation-error",
        "Smaller discretisation error",
        "E_disc(INDM) < E_disc(DDPM) in TV(p_r, p_g) <= E_prior + E_disc + E_est.",
        INDM,
        (
            Test(
                kind=PAIRED,
                noun="discretisation term with {sampler}",
                statistic="discretisation term of the bound on the total variation, mean over step counts",
                side="negative",
                needs=("discretisation.csv",),
                value=r.discretisation_term,
                points=r.discretised,
                protocols=("study", "budget"),
                study="discretisation",
                below=SMALLER,
                above=LARGER,
                only_units="nats",
                otherwise="the total variation needs a known density of few dimensions: 2-D data only",
            ),
            Test(
                kind=CHECK,
                noun="bound on the total variation with {sampler}",
                statistic="smallest bound − TV over step counts, plus two standard errors of the TV",
                side="equal",
                needs=("discretisation.csv",),
                value=r.bound_slack,
                points=r.discretised,
                decide=never_negative,
                rule=BOUND_RULE,
                pairing=ITSELF,
                protocols=("study",),
                study="discretisation",
                unit=RUNS,
                caveat="measured shares obey this but for the draws that two of the processes share: it guards the "
                "measurement and is no evidence by itself",
                only_units="nats",
                otherwise="the total variation needs a known density of few dimensions: 2-D data only",
            ),
        ),
    ),
    Claim(
        "image-translation",
        "Translation between two domains",
        "One INDM translates between two domains, with no conditional model and no second diffusion model.",
        INDM,
        (
            Test(
                kind=PAIRED,
                noun="distance of translated images to the target domain",
                statistic="distance of translated images to the target domain over the distance between the domains",
                side="negative",
                needs=("translation.csv",),
                otherwise="no model of two domains is trained, and nothing is translated, in this suite",
            ),
        ),
    ),
    Claim(
        "special-case",
        "DDPM++ and NCSN++ as special cases",
        "DDPM++ (NCSN++) is INDM with the identity flow.",
        INDM,
        (
            Test(
                kind=CHECK,
                noun="largest difference between INDM with the identity flow and a linear diffusion written out by "
                "itself",
                statistic="largest |difference| over losses, their gradients, likelihoods and samples",
                side="equal",
                needs=("identities.csv",),
                value=r.largest_difference("special-case"),
                decide=equal(0.0, 0.0),
                rule=EXACT_RULE,
                pairing=ITSELF,
                variants=LINEAR,
                protocols=("study",),
                study="identities",
                unit=RUNS,
            ),
        ),
    ),
    Claim(
        "resnet-over-glow",
        "Residual flow over Glow",
        "INDM converges with residual flows and not with Glow-based flows.",
        OPEN,
        (
            Test(
                kind=PAIRED,
                noun="test NELBO",
                statistic="test NELBO at the end of training, residual included",
                side="negative",
                needs=(LIKELIHOOD,),
                value=r.bound("nelbo"),
                per_image="nelbo",
                pairs=(("indm-vp-nll", "indm-vp-glow"),),
                pairing="INDM with a residual flow with INDM with a Glow flow, of the same seed",
                protocols=("likelihood", "budget"),
                units="data",
                below=LOWER,
                above=HIGHER,
            ),
        ),
    ),
    Claim(
        "linear-pretraining",
        "Pre-training as a linear diffusion",
        "INDM works better when pre-trained as a linear diffusion.",
        OPEN,
        (
            Test(
                kind=PAIRED,
                noun="test NELBO",
                statistic="test NELBO at the end of training, residual included",
                side="negative",
                needs=(LIKELIHOOD,),
                value=r.bound("nelbo"),
                per_image="nelbo",
                pairs=(("indm-vp-pretrained", "indm-vp-nll"),),
                pairing="INDM pre-trained with the identity flow with INDM from scratch, of the same seed",
                # pre-training may come on top of the same budget: the note says so where it does
                protocols=("likelihood",),
                units="data",
                below=LOWER,
                above=HIGHER,
            ),
        ),
    ),
    Claim(
        "flow-role",
        "What the flow does",
        "What the flow does to an image, how far z_0 and z_T are from Gaussian.",
        f"{OPEN}; put here in a form that can be tested: the flow moves z_0 nearer to a Gaussian",
        (
            Test(
                kind=PAIRED,
                noun="divergence of z_0 from Gaussian",
                statistic="KL(law of z_0 || Gaussian of its moments) minus that of the data x (nats an image)",
                side="negative",
                needs=("latents.csv",),
                value=r.latent("kl_gaussian_change"),
                pairing=f"{BY_SEED}; the counterpart's z_0 is x, and its number 0 but for rounding",
                protocols=("study", "budget"),
                study="latents",
                units="nats",
                below=LOWER,
                above=HIGHER,
                caveat="this harness's reading of an open question",
            ),
        ),
    ),
)

THE_TABLES = (
    Claim(
        "state-of-the-art",
        "State of the art",
        "FID 1.75 on CelebA; the CIFAR-10 table.",
        INDM,
        (
            Test(
                kind=OWN,
                noun="FID with {sampler} minus the published one",
                statistic="FID of 50,000 samples at the largest step count minus the published one",
                side="negative",
                needs=(ROBUSTNESS,),
                value=r.published_distance(PUBLISHED_FID),
                points=r.longest_or_adaptive,
                pairing="none: the published number has no spread",
                variants=("indm-vp-fid", "indm-ve"),
                protocols=("robustness",),
                below="{ours}'s FID with {sampler} is {size} below the published one",
                above="{ours}'s FID with {sampler} is {size} above the published one",
                only_suites=("cifar10", "celeba64"),
                otherwise="neither the data nor the scale is the paper's: only the GPU suites can measure it",
            ),
        ),
    ),
)

OWN_QUESTIONS = (
    Claim(
        "sample-quality",
        "Better samples",
        "INDM's samples are closer to the data at the largest step count.",
        "a question of this harness's own; the paper claims it on its own data sets",
        (
            Test(
                kind=PAIRED,
                noun="{distance} of the samples at {steps} steps of {sampler}",
                statistic="{distance} of the samples to the data at the largest step count",
                side="negative",
                needs=(ROBUSTNESS,),
                value=r.distance,
                points=r.longest,
                protocols=("robustness", "budget"),
                below=LOWER,
                above=HIGHER,
            ),
        ),
        scope=HARNESS,
    ),
)
