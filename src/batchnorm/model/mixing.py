"""Put a mixin before an object's class at run time, and take it off again.

The object stays the same: its parameters, buffers, hooks, name in the model, and whoever holds it.
"""

from typing import Any

from torch import nn

_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


class Mixin(nn.Module):
    """What is put before a class; copies and pickles find both by name."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        mixin, cls = type(self).__bases__
        return _rebuild, (mixin, cls), self.__getstate__()  # type: ignore[no-untyped-call]


def mix(mixin: type[Mixin], module: nn.Module) -> None:
    """Let the module be an instance of the mixin, too."""
    module.__class__ = _mixed(mixin, type(module))


def unmix(module: nn.Module) -> None:
    """Give a mixed module its own class back."""
    module.__class__ = own_class(module)


def own_class(module: nn.Module) -> Any:
    """The class of a mixed module before it was mixed."""
    return type(module).__bases__[1]


def _mixed(mixin: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """Under the class's own name: tracing asks for its module."""
    if (mixin, cls) not in _CLASSES:
        content = {"__module__": cls.__module__, "__doc__": cls.__doc__}
        _CLASSES[mixin, cls] = type(cls.__name__, (mixin, cls), content)
    return _CLASSES[mixin, cls]


def _rebuild(mixin: type[nn.Module], cls: type[nn.Module]) -> nn.Module:
    return nn.Module.__new__(_mixed(mixin, cls))
