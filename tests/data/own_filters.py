"""Filters of one's own, as `config.prepare.clean` names them: module-level functions."""

from jaxlm.data.cleaning import Changed, Dropped


def keep(text, *, word="bad"):
    return word not in text


def required(text, *, word):
    return word in text


def shout(text):
    return text.upper()


def count(text):
    return (
        Changed(text.replace("x", ""), {"x": text.count("x")}) if len(text) < 100 else Dropped("long", str(len(text)))
    )


def crash(text):
    return text[1_000]


def broken(text):
    return 3


LIMIT = 3
