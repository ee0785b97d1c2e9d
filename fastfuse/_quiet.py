"""Other libraries' start-up messages, kept off the screen of the commands. Importing fastfuse itself silences nothing."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

# logger -> the start of what it says while its library loads, about parts that nothing here uses
STARTUP = {
    "torchao": "Failed to load ",  # its CUDA libraries, on a machine without CUDA
    "torch.utils._pytree": "%s is an Enum subclass",  # torchao's enums
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # an optional kernel, from another package
}


@contextlib.contextmanager
def quiet_startup() -> Iterator[None]:
    """Inside the block, the messages of STARTUP and deprecation warnings are not shown; all else is, and afterwards everything.

    For imports, and for calls that hand on what the user did not write. What a call says about the user's own arguments belongs outside.
    """

    def keep(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(STARTUP[record.name])

    loggers = [logging.getLogger(name) for name in STARTUP]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)
