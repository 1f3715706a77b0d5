"""The main text of web pages, without mark-up, menus, advertisements and other boilerplate, by trafilatura.

Text without HTML tags stays as it is. `pip install "jaxlm[html]"`.
"""

from functools import partial
import importlib.util
import re
from typing import Any

from jaxlm.data.cleaning import Dropped, Rule
from jaxlm.lookup import Mistake, key

PAGE = re.compile(r"<(?:!doctype|html|head|body|div|article|section|main|table|p|span)\b[^<]*>", re.IGNORECASE)
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

    if not PAGE.search(text):
        return text
    return trafilatura.extract(text, **options) or Dropped("no main text")
