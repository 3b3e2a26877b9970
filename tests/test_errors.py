"""Other libraries' errors, made fit for a line of growkit's own."""

import pytest

from growkit.errors import first_line


@pytest.mark.parametrize(
    ("said", "most", "line"),
    [
        ("one two\nthree", None, "one two"),
        ("one two three", 13, "one two three"),
        ("one two three", 12, "one two ..."),
        ("One two. Three four five", 20, "One two"),
        ("One. Two. Three four", 18, "One. Two"),
        ("1. one two three four five", 20, "1. one two ..."),
        ("HTTP 404 vs. one two three four five six", 36, "HTTP 404 vs. one two three four ..."),
        ("onetwothree", 10, "onetwo ..."),
        ("", None, "ValueError"),
    ],
)
def test_long_line_ends_with_a_sentence_or_a_word(said: str, most: int | None, line: str) -> None:
    assert first_line(ValueError(said), most) == line
    assert most is None or len(line) <= most
