"""The commands of a run as they were typed, for repeating it."""

import re
import shlex

WIDTH = 86  # characters of a command in one line
ONCE = ("--force", "--resume", "--json")  # options that do not affect the result


def command_line(typed: object) -> str:
    """A recorded command, as one would type it to repeat the run; empty if it is missing or damaged."""
    if not isinstance(typed, str):
        return ""
    try:
        words = shlex.split(typed)
    except ValueError:
        return ""
    return shlex.join(word for word in words if word not in ONCE)


def in_lines(command: str) -> str:
    """Break a long command into lines before options, so that it can still be copied."""
    lines = [""]
    # never inside quotes, where the backslash of a line break would be part of the word
    for part in re.findall(r"""(?:[^\s'"]|'[^']*'|"[^"]*"|['"]|\s(?!--))+""", command):
        if lines[-1] and len(lines[-1]) + len(part) > WIDTH:
            lines.append(f"    {part}")
        else:
            lines[-1] += f" {part}" if lines[-1] else part
    return " \\\n".join(lines)
