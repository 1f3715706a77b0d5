"""Personal data become tokens: <EMAIL>, <PHONE>, <IP>, <CARD>, in a way that leaves code and version numbers alone.

    e-mail    name@host.tld, in any script, also before a port; no name of a file (icon@2x.png), no git remote
              (git@host:path)
    card      14 to 19 digits in the issuers' ranges (ISO/IEC 7812) whose Luhn checksum holds
    ip        IPv4 and IPv6 addresses that are routed in the Internet; not 127.0.0.1, 192.168.0.1, "version 1.2.3.4"
    phone     international ("+44 20 7946 0958") and North American ("(212) 555-0123"); other national forms look like
              any number, and stay

Names and postal addresses are not recognised.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
import ipaddress
import re

from jaxlm.data.cleaning import Changed, Rule

EMAIL = re.compile(
    r"(?<![\w.+%-])[^\W_](?:[\w.+%-]{0,62}[\w+%-])?@(?:[^\W_](?:(?:[^\W_]|-){0,61}[^\W_])?\.)+"
    r"(?:[A-Za-z]{2,24}(?![\w-])|[A-Za-z]{2,24}(?=[\u2e80-\uffff])|[^\W\d_A-Za-z]{2,24}(?![\w-]))"
    r"(?!@|:(?!\d{1,5}(?![\w.-]))[\w/~]|\.\w)"
)
CARD = re.compile(r"(?<![\w.,+-])(?<!\d[ ])[2-6]\d{3}(?:[ -]?\d){10,15}(?![\w-]|[.,]\d|[ ]\d)")
ISSUERS = (  # the first digits, and how many digits in all
    (re.compile(r"4"), (16, 19)),
    (re.compile(r"5[1-5]|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)"), (16,)),
    (re.compile(r"3[47]"), (15,)),
    (re.compile(r"3(?:0[0-5]|[68])"), (14,)),
    (re.compile(r"6(?:011|4[4-9]|5)|35(?:2[89]|[3-8]\d)"), (16,)),
    (re.compile(r"62"), (16, 17, 18, 19)),
)
IPV4 = re.compile(r"(?<![\w.-])(?<!==)(?<!\w/)(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\w)")
IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?![\w:]|\.\w)")
VERSION = re.compile(
    r"(?:\b(?:v|ver|version|release|rev|section|sec|chapter|rule|clause|part|table|figure)\b[.:]?|§) ?$", re.I
)
PHONE = re.compile(
    r"(?<![\w.+*/=-])(?:\+[1-9](?:[ .-]?\(?\d{1,4}\)?){3,7}"
    r"|(?:1[ .-])?(?:\([2-9]\d\d\) ?[2-9]\d\d[ .-]|[2-9]\d\d[.-][2-9]\d\d[.-])\d{4})(?![\w]|[.-]\w)"
)
FILES = "avif bmp css gif html ico jpeg jpg js json md path pdf php png py service slice socket svg timer ts txt webp"


def rule(*, email: bool = True, card: bool = True, ip: bool = True, phone: bool = True) -> Rule:
    """Which kinds are replaced; in this order, so that a card's digits are no telephone number."""
    kinds = dict(email=email, card=card, ip=ip, phone=phone)
    return partial(_rule, kinds=tuple(kind for kind, wanted in kinds.items() if wanted))


def _rule(text: str, kinds: tuple[str, ...]) -> Changed:
    counts: Counter[str] = Counter()
    for kind in kinds:
        for pattern, is_one in KINDS[kind]:
            text = pattern.sub(partial(_replace, kind=kind, is_one=is_one, counts=counts), text)
    return Changed(text, counts)


def _replace(match: re.Match, kind: str, is_one: Callable[[re.Match], bool], counts: Counter[str]) -> str:
    if not is_one(match):
        return match[0]
    counts[kind] += 1
    return f"<{kind.upper()}>"


def luhn(digits: str) -> bool:
    """Whether the Luhn checksum of a string of digits holds."""
    doubled = [int(d) * (1 + i % 2) for i, d in enumerate(reversed(digits))]
    return sum(d - 9 * (d > 9) for d in doubled) % 10 == 0


def _is_email(match: re.Match) -> bool:
    return match[0].rpartition(".")[2].lower() not in FILES.split() and ".." not in match[0]


def _is_card(match: re.Match) -> bool:
    digits = re.sub(r"\D", "", match[0])
    issued = any(first.match(digits) and len(digits) in lengths for first, lengths in ISSUERS)
    return issued and len(set(digits)) > 1 and luhn(digits)


def _is_address(match: re.Match) -> bool:
    if VERSION.search(match.string[max(0, match.start() - 12) : match.start()]):
        return False
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    return address.is_global and not address.is_multicast


def _is_phone(match: re.Match) -> bool:
    digits, marks = re.sub(r"\D", "", match[0]), re.findall(r"[ .()-]+", match[0])
    if marks == ["."] or match[0].count("(") != match[0].count(")"):  # +1.2345678901 is a number
        return False
    return 10 <= len(digits) <= 15


KINDS: dict[str, tuple[tuple[re.Pattern, Callable[[re.Match], bool]], ...]] = dict(
    email=((EMAIL, _is_email),),
    card=((CARD, _is_card),),
    ip=((IPV4, _is_address), (IPV6, _is_address)),
    phone=((PHONE, _is_phone),),
)
