"""Networks that other code trained, read without running anything of theirs, and measured as the suites' own runs are.

`torch_files` reads a PyTorch file that can hold tensors and plain data only; `score_sde` knows the official NCSN++,
DDPM++ and DDPM checkpoints, `indm_flow` those of INDM's flow, `diffusers_unet` the folders of the diffusers library;
`networks` tells a foreign network time and data in its own units; `pretrained` writes and loads the folder of an
import, `measure` evaluates one.
"""
