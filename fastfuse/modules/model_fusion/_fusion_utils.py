"""Which parameters tie a pretrained encoder to a pretrained decoder."""

from functools import partial

from torch import nn

from fastfuse.errors import InvalidArgument


def _own_parameter_names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def register_fusion_module(module: nn.Module) -> None:
    """Gives the module a method fusion_params(), the names of all its parameters."""
    module.fusion_params = partial(_own_parameter_names, module)


def get_fusion_params(model: nn.Module) -> dict[str, nn.Parameter]:
    """{full name: parameter} of what the model's modules name in fusion_params().

    Raises ValueError where a module names a parameter that it does not have.
    """
    parameters = dict(model.named_parameters())
    fusion, missing = {}, []
    for prefix, module in model.named_modules():
        names = module.fusion_params() if callable(getattr(module, "fusion_params", None)) else ()
        for name in names:
            full = f"{prefix}.{name}" if prefix else name
            if full in parameters:
                fusion[full] = parameters[full]
            else:
                missing.append(full)
    if missing:
        raise InvalidArgument(f"Fusion params {missing} not converted: the model has no parameters of these names")
    return fusion
