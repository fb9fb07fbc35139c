"""Score networks: NCSN++ and DDPM++ for images, a residual multilayer perceptron for points."""

from models.score.mlp import ScoreMLP
from models.score.ncsnpp import NCSNpp

__all__ = ["NCSNpp", "ScoreMLP"]
