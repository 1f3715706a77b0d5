"""Personal data become tokens, and what only looks like them stays: code, versions, dates, numbers."""

from hypothesis import given
from hypothesis import strategies as st
import pytest

from jaxlm.data.cleaning import Cleaner
from jaxlm.data.cleaning.pii import luhn


def clean(text, **options):
    """(text, what was done, how often what was replaced)"""
    outcome = Cleaner.of([dict(name="pii", **options)])(text)
    return outcome.text, outcome.steps[-1].did, dict(outcome.steps[-1].why)


@pytest.mark.parametrize(
    "text, scrubbed",
    [
        ("write to john.doe+news@mail.example.co.uk, please", "write to <EMAIL>, please"),
        ("mailto:a@b.io.", "mailto:<EMAIL>."),
        ("4111 1111 1111 1111", "<CARD>"),
        ("5500-0000-0000-0004 and 378282246310005", "<CARD> and <CARD>"),
        ("http://8.8.4.4/x, 1.1.1.1:53", "http://<IP>/x, <IP>:53"),
        ("at 2001:4860:4860::8888, and", "at <IP>, and"),
        ("call (212) 555-0123 or 212-555-0123", "call <PHONE> or <PHONE>"),
        ("+44 20 7946 0958, +49 (30) 901820-123, +4915112345678", "<PHONE>, <PHONE>, <PHONE>"),
        ("1-800-234-5678", "<PHONE>"),
        ("call (212) 555 0123, (212)555 0123", "call <PHONE>, <PHONE>"),
        ("ssh root@db.example.com:5432, or ftp://joe@x.org:21/pub", "ssh <EMAIL>:5432, or ftp://<EMAIL>:21/pub"),
        ("jürgen@müller.de, иван@пример.рф, a@例え.jp", "<EMAIL>, <EMAIL>, <EMAIL>"),
        ("请写信至 joe@x.com谢谢", "请写信至 <EMAIL>谢谢"),
    ],
)
def test_personal_data_become_tokens(text, scrubbed):
    got, did, counts = clean(text)
    assert (got, did) == (scrubbed, "changed") and sum(counts.values()) == scrubbed.count("<")


@pytest.mark.parametrize(
    "text",
    """version 1.2.3.4 of it|v1.2.3.4|Chrome/96.0.66.110 Safari|numpy==1.2.3.4|foo-1.2.3.4.tar.gz|§ 8.8.8.8|1.2.3.4.5
127.0.0.1 192.168.1.1 0.0.0.0 255.255.255.255 10.0.0.1 999.1.1.1 2001:db8::1 fe80::1 ::1
std::vector<int> a::b face::add dead::beef x[2:3] a[2000:3000:2] 2023:12:31 10:00:00 2000:01:02
a @ b|@decorator|git@github.com:org/repo.git|git@x.com:2024-a/b|icon@2x.png|pkg@1.2.3|getty@tty1.service|user@host
x = 4111111111111112|0.4111111111111111|1234567890123456|4000000000000000|0x4111111111111111|4111-1111-1111-1111-2
2024-01-15 10:20:30|978-0-306-40615-7|550e8400-e29b-41d4-a716-446655440000|1700000000000|1,234,567,890
+1.2345678901|3.14159265358979|sum(+12345678)|123-45-6789|555-0199|356a192b7913b04c54574d18c28d46e6395428ab""".replace(
        "\n", "|"
    ).split("|"),
)
def test_code_versions_dates_and_numbers_are_left_alone(text):
    assert clean(text) == (text, "kept", {})


def test_kinds_of_personal_data_can_be_left():
    text = "joe@x.org at 8.8.8.8, +44 20 7946 0958, 4111111111111111"
    assert clean(text, email=False, phone=False)[0] == "joe@x.org at <IP>, +44 20 7946 0958, <CARD>"


@given(st.text("0123456789", min_size=2, max_size=19))
def test_luhn_holds_for_one_last_digit_in_ten_and_notices_any_wrong_digit(digits):
    right = [d for d in "0123456789" if luhn(digits + d)]
    assert len(right) == 1
    wrong = str((int(digits[0]) + 1) % 10) + digits[1:] + right[0]
    assert not luhn(wrong)


@given(st.text("4123 -.@:+ab\n", max_size=60))
def test_what_was_scrubbed_once_stays(text):
    once = clean(f"x{text}")[0]
    assert clean(once)[0] == once
