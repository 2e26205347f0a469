"""What the commands at the top are made of, a room each; the docstring of each says what it knows."""

import sys


def _told(kind, *error, show=sys.excepthook):
    """Ctrl-C while a command still imports what it needs is no error to be traced. Afterwards common.run has it."""
    if kind is not KeyboardInterrupt:
        show(kind, *error)


sys.excepthook = _told
