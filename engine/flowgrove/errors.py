"""The error that a user can cause: one line that says what is wrong, where, and what to write instead. Commands end with exit code 2."""


class UserError(ValueError):
    """Its text is shown as it is, without a traceback."""
