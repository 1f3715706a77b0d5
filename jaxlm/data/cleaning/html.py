"""The main text of web pages, without mark-up, menus, advertisements and other boilerplate, by trafilatura.

Text that is no page stays as it is, also where it speaks of tags: a page, or a part of one, begins with one of them and
closes some, or ends with </body> or </html>. `pip install "jaxlm[html]"`.
"""

from functools import partial
import importlib.util
import re
from typing import Any

from jaxlm.data.cleaning import Dropped, Rule
from jaxlm.lookup import Mistake, key

LIBRARY = "trafilatura"
PAGE = re.compile(
    r"\ufeff?\s*<(?:!--|(?:!doctype|\?xml|html|head|body|title|meta|script|style|div|article|section|main|header|nav|table|"
    r"ul|ol|h[1-6]|p|span)\b).*</\w+\s*>|.*</(?:html|body)\s*>\s*\Z",
    re.IGNORECASE | re.DOTALL,
)
FAVOURS = dict(balance={}, precision=dict(favor_precision=True), recall=dict(favor_recall=True))


def rule(*, favour: str = "balance", tables: bool = True, comments: bool = False, fast: bool = True) -> Rule:
    """`favour` says which mistake is worse: "precision" leaves more out, "recall" takes more in; `fast` does without
    a second opinion on what the text is (experiments/cleaning). Readers' `comments` below an article are boilerplate
    unless asked for.
    """
    options = key("config.prepare.clean: html.favour", favour, FAVOURS)
    if importlib.util.find_spec("trafilatura") is None:
        raise Mistake('config.prepare.clean: html needs trafilatura; pip install "jaxlm[html]"')
    return partial(_rule, options=dict(options, include_tables=tables, include_comments=comments, fast=fast))


def _rule(text: str, options: dict[str, Any]) -> str | Dropped:
    import trafilatura

    if not PAGE.match(text):
        return text
    return trafilatura.extract(text, **options) or Dropped("no main text")
