"""JUnit XML parses, counts, and lets no markup through."""

import functools
import xml.etree.ElementTree as ET
from datetime import UTC, datetime

import pytest

from growkit.deploy.checks import Check, check, shown
from growkit.deploy.junit import junit_xml as xml_of
from growkit.files import plain

junit_xml = functools.partial(xml_of, started=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), seconds=1.25)

CHECKS = [
    check("numbers", "batch 1: error", True, 1e-7, 1e-5),
    check("weights", '<b>"a" & b</b>', False, "]]>", "-", 'got <script> & "quotes"\x00'),
    Check("latency", "batch 1", "inconclusive", 1.2, 1.1, "the machine is too noisy"),
]


def test_counts_and_outcomes() -> None:
    suite = ET.fromstring(junit_xml(CHECKS, suite="growkit verify")).find("testsuite")
    assert suite is not None
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "3", "failures": "1", "errors": "0", "skipped": "1"}
    assert [[child.tag for child in case] for case in suite.iter("testcase")] == [[], ["failure"], ["skipped"]]
    assert suite.findall("testcase")[0].get("classname") == "growkit verify.numbers"


def test_everything_that_the_schemas_of_ant_and_jenkins_ask_for_is_there() -> None:
    suite = ET.fromstring(junit_xml(CHECKS, suite="growkit verify"))[0]
    assert {k: suite.get(k) for k in ("timestamp", "hostname", "time", "package", "id")} == {
        "timestamp": "2026-01-02T03:04:05",
        "hostname": "localhost",
        "time": "1.250",
        "package": "growkit verify",
        "id": "0",
    }
    assert [e.tag for e in suite] == ["properties", *["testcase"] * 3, "system-out", "system-err"]
    cases = suite.findall("testcase")
    assert all({"classname", "name", "time"} <= set(case.attrib) for case in cases)
    assert [sorted(outcome.attrib) for case in cases for outcome in case] == [["message", "type"], ["message"]]


def test_markup_is_escaped_and_unwritable_characters_spelled_out() -> None:
    text = junit_xml(CHECKS, suite="<suite>")
    assert "<script>" not in text
    suite = ET.fromstring(text)[0]
    assert suite.get("name") == "<suite>"
    case = suite.findall("testcase")[1]
    assert case.get("name") == '<b>"a" & b</b>'
    assert case[0].get("message") == 'got <script> & "quotes"\\x00'
    assert case[0].text == 'got <script> & "quotes"\\x00\nmeasured ]]>, allowed -'


def test_plain_spells_out_what_json_has_no_word_for() -> None:
    assert plain({"a": (float("nan"), 1.5), "b": [float("-inf")]}) == {
        "a": ["nan", 1.5],
        "b": ["-inf"],
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "1"), (0.999999, "1 - 1e-06"), (1.0000003, "1 + 3e-07"), (0.99, "0.99"), (0.9996, "1 - 0.0004"), ("a", "a")],
)
def test_number_next_to_one_shows_how_far_it_is_off(value: float | str, text: str) -> None:
    assert shown(value) == text
