"""Errors that the command line turns into exit codes."""


class InputError(ValueError):
    """Input that cannot be used: one line naming the key, the value and what is accepted (exit code 2)."""


class RunFailure(RuntimeError):
    """A run that cannot go on, for a reason that one line tells: no traceback is shown (exit code 1)."""

    # whether it is raised in all processes that work on the run, or in none
    shared = False
