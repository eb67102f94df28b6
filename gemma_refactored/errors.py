"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """Bad input: one clear sentence that says what is wrong and what to do next.

    Command lines print it without a traceback and exit with code 2.
    """
