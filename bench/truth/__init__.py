"""Ground truth: problems whose every number is known in closed form, and the harness measured against them.

``problems`` and ``densities`` hold the exact answers, ``laws`` the exact law of a sampler as it is written,
``convergence`` the orders of samplers and integrators, ``battery`` the table of ``indm-bench validate``. Everything
is float64 and deterministic. The truths are computed from the definitions of the processes, not from the code under
test.
"""
