"""The one exception for input that a user can correct."""


class UserError(ValueError):
    """An option, config, file or data set cannot be used. The message names it and the fix; commands show only this."""
