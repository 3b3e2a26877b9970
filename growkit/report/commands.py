"""The commands of a run as they were typed, for whoever does it again."""

import re
import shlex

from growkit.report.facts import Step

WIDTH = 86  # characters of a command in one line
ONCE = ("--force", "--resume", "--json")  # what says nothing of the result


def command_line(step: Step) -> str:
    """The command of a step, as one would type it to make the run anew; empty where none is on record.

    None is where a step was made from Python.
    """
    typed = step.content.get("command_line")
    if not isinstance(typed, str):
        return ""
    try:
        words = shlex.split(typed)
    except ValueError:  # damaged
        return ""
    return shlex.join(word for word in words if word not in ONCE)


def in_lines(command: str) -> str:
    """A long command over several lines, broken before options, so that it can still be copied."""
    lines = [""]
    # never inside quotes, where the backslash of a broken line would be a part of the word
    for part in re.findall(r"""(?:[^\s'"]|'[^']*'|"[^"]*"|['"]|\s(?!--))+""", command):
        if lines[-1] and len(lines[-1]) + len(part) > WIDTH:
            lines.append(f"    {part}")
        else:
            lines[-1] += f" {part}" if lines[-1] else part
    return " \\\n".join(lines)
