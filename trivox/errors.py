"""The error that is told in one sentence: without torch, for what speaks without it."""


class UserError(Exception):
    """Something that the user can mend: a command prints it as one sentence, without a traceback."""
