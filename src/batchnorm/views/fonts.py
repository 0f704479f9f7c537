"""Which font draws a language's words: a box in the place of a glyph is never drawn."""

import contextlib
from functools import cache

from matplotlib import font_manager

from batchnorm.errors import BatchNormError
from batchnorm.views.words import LANGUAGES, PHRASES, Words

# tried first, since among fonts with the glyphs these read best
PREFERRED = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "SimHei",
    "Heiti TC",
)


def family(words: Words) -> str:
    """The name of a font of matplotlib's that has every glyph of the language.

    Raises:
        BatchNormError: no font on this machine has them.
    """
    if (found := _family(words.language)) is None:
        raise BatchNormError(
            f"no font on this machine has the glyphs of the language {words.language!r}. Install "
            "one (Debian: apt install fonts-noto-cjk; elsewhere Noto Sans SC), or leave out --lang."
        )
    return found


@cache
def _family(language: str) -> str | None:
    place = LANGUAGES.index(language)
    glyphs = {ord(c) for phrases in PHRASES.values() for c in phrases[place] if c.isprintable()}
    return _first(glyphs) or (_rescan() and _first(glyphs)) or None


def _first(glyphs: set[int]) -> str | None:
    available = dict.fromkeys(entry.name for entry in font_manager.fontManager.ttflist)
    ranked = [name for name in PREFERRED if name in available]
    return next((name for name in [*ranked, *available] if _covers(name, glyphs)), None)


def _rescan() -> bool:
    """matplotlib's list is from when it was first imported: add the fonts installed since."""
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    new = set(font_manager.findSystemFonts()) - known
    for path in sorted(new):
        with contextlib.suppress(RuntimeError, OSError):  # a broken file is no font
            font_manager.fontManager.addfont(path)
    return bool(new)


def _covers(name: str, glyphs: set[int]) -> bool:
    try:
        path = font_manager.findfont(name, fallback_to_default=False)
        charmap = font_manager.get_font(path).get_charmap()
    except (ValueError, OSError, RuntimeError):  # listed, and gone or unreadable since
        return False
    return glyphs <= charmap.keys()
