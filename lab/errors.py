"""The error that a user can mend."""


class LabError(ValueError):
    """One sentence: what was wrong, where, and what to do. The command line prints it without a traceback."""
