"""Failures of a flow."""


class FlowInverseError(RuntimeError):
    """The fixed-point iteration of an inverse did not converge."""
