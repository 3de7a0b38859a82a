"""The one error that a user of lqa is meant to read."""


class LqaError(ValueError):
    """One sentence that says what is wrong and what to do.  The command line prints it and exits with 2; the page shows it."""
