"""Errors that a user can mend: the command line prints their one sentence, without a traceback."""


class UserError(Exception):
    """What was wrong, where, and what to do."""
