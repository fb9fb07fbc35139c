"""Conventions at the truncation eps: which noise the residual sees, and whether there is a residual at all."""

from __future__ import annotations

from collections.abc import Iterator

from bench.conventions.case import Case, Row


def two_draws(case: Case) -> Iterator[Row]:
    """The residual denoises another draw than the one that the score sees.

    Its inner product then has mean zero, so the difference is E[n . noise(z_eps)] = sigma E[tr d noise/dz].
    """
    one, two = case.residual_pair
    trace, _ = case.stein
    for quantity, right in (("NELBO", case.right_nelbo), ("NLL", case.right_nll)):
        yield case.likelihood_row(quantity, right, right + two - one, trace)


def no_correction(case: Case) -> Iterator[Row]:
    """The bound without its residual (closed form: minus the residual by Stein's identity), and the ODE from z_0."""
    one, _ = case.residual_pair
    _, residual = case.stein
    yield case.likelihood_row("NELBO", case.right_nelbo, case.right_nelbo - one, -residual)
    yield case.likelihood_row("NLL", case.right_nll, case.nll(corrected=False))
