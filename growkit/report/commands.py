"""The commands of a run as they were typed, for whoever does it again."""

import re
import shlex

WIDTH = 86  # characters of a command in one line
ONCE = ("--force", "--resume", "--json")  # what says nothing of the result


def command_line(typed: object) -> str:
    """A command on record, as one would type it to make the run anew; empty where there is none, or a damaged one."""
    if not isinstance(typed, str):
        return ""
    try:
        words = shlex.split(typed)
    except ValueError:
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
