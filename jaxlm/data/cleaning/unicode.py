"""Unicode and mojibake repair by ftfy: "cafÃ©" becomes "café", "&amp;" outside of HTML "&", line ends "\\n".

Typographic quotes stay as they were written, unless `uncurl_quotes`; full-width signs, which Chinese and Japanese use
as punctuation, unless `fix_width`.
"""

from functools import partial
import re

import ftfy

from jaxlm.data.cleaning import Rule
from jaxlm.lookup import key

LIBRARY = "ftfy"
PLAIN = re.compile(r"[\t\n -%'-~]*")  # nothing here to repair: ASCII without "&" and control characters
LINE = re.compile(r"[^\n]*\n|[^\n]+")


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
    return partial(_rule, config=config)


def _rule(text: str, config: ftfy.TextFixerConfig) -> str:
    """ftfy.fix_text, which goes line by line and looks a dozen times at each; but for plain ones once."""
    if PLAIN.fullmatch(text):
        return text
    out = []
    for line in LINE.findall(text):
        out.append(line if PLAIN.fullmatch(line) else ftfy.fix_text(line, config))
        if config.unescape_html == "auto" and "<" in line:  # from here on it is HTML
            config = config._replace(unescape_html=False)
    return "".join(out)
