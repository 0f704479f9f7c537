"""The terminal's console."""

from typing import Any

from rich.console import Console


def terminal(**options: Any) -> Console:
    """Rich's, which prints names as they are: it colours no numbers, and makes no emoji of `:key:`."""
    return Console(highlight=False, emoji=False, **options)
