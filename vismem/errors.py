"""The error that is meant for the person at the keyboard."""


class UserError(Exception):
    """What was wrong, where, and what to do, in one message. The CLI prints it and exits with status 1."""
