"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """Bad input; the message names key or file, the value got, the rule and the remedy.

    The command-line programs print it without a traceback and exit with status 2.
    """
