"""The one exception the trainer raises for input that cannot be used."""


class InputError(ValueError):
    """An option, config key, file or data set cannot be used; the one-line message names it and the remedy."""
