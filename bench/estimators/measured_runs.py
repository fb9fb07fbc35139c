"""The trained networks on which the estimators are measured; imports nothing, for the pipeline names them too."""

# (suite, variant), of which the first seed is measured
MEASURED_RUNS = (("digits", "ddpmpp-vp"), ("digits", "indm-vp-nll"), ("digits", "indm-vp-fid"))
