"""The one exception that this library raises for a mistake that a user can mend."""


class BatchNormError(ValueError, RuntimeError):
    """What was got, what was wanted, and how to mend it, in a sentence or two.

    It is both a ``ValueError`` and a ``RuntimeError`` because torch raises the one from its Python
    half and the other from its C++ half for mistakes of the same kind; code that catches either
    from torch.nn's layers goes on working.
    """
