"""The terminal's console."""

from typing import Any

import rich.console


def terminal(**options: Any) -> rich.console.Console:
    """Rich's, which prints names as they are: it colours no numbers, and makes no emoji of `:key:`."""
    return rich.console.Console(highlight=False, emoji=False, **options)
