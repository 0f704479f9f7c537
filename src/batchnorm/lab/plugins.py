"""Find a user's function by its name."""

import importlib
from collections.abc import Callable
from typing import Any

from batchnorm.errors import BatchNormError, brief


def resolve(spec: str, what: str) -> Callable[..., Any]:
    """The function that `package.module:function` names; `what` it is for goes into errors."""
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise BatchNormError(f"the {what} {spec!r} should be named as package.module:function.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise BatchNormError(
            f"the {what} {spec}: importing {module_name} raised {brief(error)}. "
            "Modules are looked for in the current folder and where Python finds its own."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        found = "has none of that name" if function is None else f"has a {type(function).__name__}"
        raise BatchNormError(
            f"the {what} {spec} should be a function, but {module_name} {found}. "
            f"Define {name} there, or name another."
        )
    return function  # type: ignore[no-any-return]  # callable, as just checked
