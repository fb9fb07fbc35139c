"""Words and numbers that several claims share: variants, pairings, sentences."""

from __future__ import annotations

# identities are claims about the linear diffusion; what the flow adds does not enter them
LINEAR = ("ddpmpp-vp", "ddpmpp-subvp", "ncsnpp-ve")
ITSELF = "none: the two sides are computed on one run, from the same images"

LOWER, HIGHER = "{ours}'s {noun} is {size} lower than {theirs}'s", "{ours}'s {noun} is {size} higher than {theirs}'s"
SMALLER, LARGER = (
    "{ours}'s {noun} is {size} smaller than {theirs}'s",
    "{ours}'s {noun} is {size} larger than {theirs}'s",
)
