"""The errors of fastfuse's own."""


class Unsupported(NotImplementedError):
    """No kernel covers this call. `code` is a stable name for the reason, which patch reports carry."""

    def __init__(self, message: str, code: str = "UNSUPPORTED"):
        super().__init__(message)
        self.code = code


class InvalidArgument(ValueError, AssertionError):
    """A ValueError where torchtune has a bare `assert`: code that catches AssertionError keeps working."""
