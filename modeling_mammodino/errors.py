"""The one exception for input that cannot be used."""


class ImageRefused(ValueError):
    """An image that cannot be read as a mammogram.

    Attributes:
        name: of the file or the position in the batch. A path may carry a patient's name: log it where that is allowed.
        reason: the field or property at fault, and the remedy; free of paths and of values of a header.

    Callers that work over many files catch this one class, note the message and go on.
    """

    def __init__(self, name: object, reason: str):
        super().__init__(str(name), reason)  # both in args, so that it crosses processes
        self.name, self.reason = str(name), reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"
