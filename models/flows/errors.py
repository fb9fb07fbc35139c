"""Failures of a flow."""


class FlowInverseError(RuntimeError):
    """The inverse of a flow failed: its iteration did not converge, or a value is not finite."""
