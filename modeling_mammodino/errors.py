"""The one exception for input that cannot be used."""


class ImageRefused(ValueError):
    """An image that cannot be read as a mammogram.

    The message names the file (or the position in the batch), the field or property at fault, and the remedy.
    Callers that work over many files catch this one class, note the message and go on.
    """
