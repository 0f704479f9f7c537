"""Put a mixin before an object's class at run time, and take it off again.

The object stays the same: its parameters, buffers, hooks, name in the model, and whoever holds it.
"""

from typing import Any

from torch import nn

_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


class Mixin(nn.Module):
    """What is put before a class; copies and pickles find both by name."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (_described(type(self)),), self.__getstate__()  # type: ignore[no-untyped-call]


def mix(mixin: type[Mixin], module: nn.Module) -> None:
    """Let the module be an instance of the mixin, too."""
    module.__class__ = _mixed(mixin, type(module))


def unmix(module: nn.Module, mixin: type[Mixin]) -> None:
    """Take a mixin off again, also from beneath others."""
    module.__class__ = _without(type(module), mixin)


def own_class(module: nn.Module) -> Any:
    """The class of a mixed module before it was mixed."""
    return type(module).__bases__[1]


def _mixed(mixin: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """Under the class's own name: tracing asks for its module."""
    if (mixin, cls) not in _CLASSES:
        content = {"__module__": cls.__module__, "__doc__": cls.__doc__}
        _CLASSES[mixin, cls] = type(cls.__name__, (mixin, cls), content)
    return _CLASSES[mixin, cls]


def _is_mixed(cls: type[nn.Module]) -> bool:
    return len(cls.__bases__) == 2 and _CLASSES.get((cls.__bases__[0], cls.__bases__[1])) is cls


def _without(cls: type[nn.Module], mixin: type[Mixin]) -> type[nn.Module]:
    outermost, inner = cls.__bases__
    return inner if outermost is mixin else _mixed(outermost, _without(inner, mixin))


def _described(cls: type[nn.Module]) -> Any:
    """A class, or a mixin and what it was put before: what a pickle can find by name."""
    return (cls.__bases__[0], _described(cls.__bases__[1])) if _is_mixed(cls) else cls


def _rebuild(described: Any) -> nn.Module:
    return nn.Module.__new__(_class_of(described))


def _class_of(described: Any) -> type[nn.Module]:
    if not isinstance(described, tuple):
        return described  # type: ignore[no-any-return]  # a class
    mixin, inner = described
    return _mixed(mixin, _class_of(inner))
