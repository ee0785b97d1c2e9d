"""One call of which bench.host measures the host time. Without fastfuse or Triton, which host.py must see imported first."""

from collections.abc import Callable
from dataclasses import dataclass

NO_GRAD, FORWARD, BACKWARD = "no grad", "grad forward", "forward + backward"
MODES = (NO_GRAD, FORWARD, BACKWARD)


@dataclass(frozen=True)
class Case:
    """What is called: function() on x(), which asks for a gradient where the mode has one."""

    name: str
    function: Callable[[], Callable]
    x: Callable[[], object]
    modes: tuple[str, ...] = MODES
    quick: bool = False  # in the set that tests check
    own: bool = False  # the host library's way, where no kernel of fastfuse runs
