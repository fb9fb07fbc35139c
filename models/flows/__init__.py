"""Invertible maps between data and latent: `forward(x) -> (z, log_det)`, `inverse(z) -> x`, log_det in nats (B,)."""

from models.flows.errors import FlowInverseError
from models.flows.global_latent import GlobalLatentFlow
from models.flows.glow import Glow
from models.flows.identity import Identity
from models.flows.residual import ResidualFlow

__all__ = ["FlowInverseError", "GlobalLatentFlow", "Glow", "Identity", "ResidualFlow"]
