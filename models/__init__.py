"""The mathematics: models, SDEs, flows, samplers and likelihoods. Knows nothing of files, loops or reports."""


def build(config):
    """The model of a configuration, see :func:`models.registry.build`."""
    from models.registry import build as from_registry

    return from_registry(config)
