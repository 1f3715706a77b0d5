"""Unicode and mojibake repair by ftfy: "cafÃ©" becomes "café", "&amp;" outside of HTML "&", line ends "\\n".

Typographic quotes stay as they were written, unless `uncurl_quotes`; full-width signs, which Chinese and Japanese use
as punctuation, unless `fix_width`.
"""

from functools import partial

import ftfy

from jaxlm.data.cleaning import Rule
from jaxlm.lookup import key


def rule(
    *,
    normalization: str | None = "NFC",
    uncurl_quotes: bool = False,
    fix_width: bool = False,
    unescape_html: bool = True,
) -> Rule:
    """`normalization` is a Unicode form or None; `unescape_html` turns entities into characters where no "<" stands."""
    forms = dict(NFC="NFC", NFD="NFD", NFKC="NFKC", NFKD="NFKD", none=None)
    config = ftfy.TextFixerConfig(
        normalization=key("config.prepare.clean: unicode.normalization", normalization or "none", forms),
        uncurl_quotes=uncurl_quotes,
        fix_character_width=fix_width,
        unescape_html="auto" if unescape_html else False,
        explain=False,
    )
    return partial(ftfy.fix_text, config=config)
