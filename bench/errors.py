"""Errors that the command line turns into exit codes."""


class InputError(ValueError):
    """Input that cannot be used: one line naming the key, the value and what is accepted (exit code 2)."""
