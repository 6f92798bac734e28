"""What was put onto a single module, so that it computes something else than its class says."""

from __future__ import annotations

from types import MethodType

from torch import nn


def is_overridden(module: nn.Module) -> bool:
    """Whether ``module`` has forward hooks or methods of its own, or is compiled."""
    return bool(module._forward_hooks or module._forward_pre_hooks or own_methods(module))


def own_methods(module: nn.Module) -> list[str]:
    """Names of the methods of its class that ``module`` itself replaces.

    accelerate's hooks, adapters and patches set ``module.forward`` and the like; what they put back
    when they are removed is the method of the class again. The call that ``module.compile()`` makes
    counts as a method.
    """
    kind = type(module)
    found = [
        name
        for name, value in vars(module).items()
        if callable(method := getattr(kind, name, None))
        and not (isinstance(value, MethodType) and value == MethodType(method, module))
    ]
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    return [*found, "__call__"] if compiled else found
