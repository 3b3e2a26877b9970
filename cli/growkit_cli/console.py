"""Output of the commands: tables and progress for people, one JSON object for programs."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from growkit.files import as_json
from growkit.text import visible

QUICK = 1.0  # seconds; shorter work leaves no trace on the screen
SOON = 5.0  # seconds until a log's first line about work that takes long
RARELY = 30.0  # seconds a log may go without a line after that
SPEED = 600.0  # window in seconds for estimating the time left: an update of a large model may take minutes
LOG_WIDTH = 160  # columns of tables in pipes and logs, whose width is unknown


class Console:
    """Prints for people on stdout; with `as_json` those lines go to stderr and stdout gets one JSON object.

    With `quiet` nothing is printed: of several processes only one prints.
    """

    def __init__(self, as_json: bool = False, *, quiet: bool = False):
        self.as_json = as_json and not quiet
        self.rich = RichConsole(stderr=as_json, highlight=False, emoji=False, soft_wrap=True, quiet=quiet)
        if not self.rich.is_terminal and "COLUMNS" not in os.environ:
            self.rich.width = LOG_WIDTH

    def say(self, line: str) -> None:
        """Print one plain line; names from files cannot add markup, terminal control codes or a second line."""
        self.rich.print(visible(line), markup=False)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table; the first column is left-aligned, the others right-aligned."""
        table = Table(title=_cell(title), title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(_cell(column), justify="right" if index else "left", no_wrap=index == 0)
        for row in rows:
            table.add_row(*map(_cell, row))
        if Measurement.get(self.rich, self.rich.options.update(max_width=10**4), table).minimum > self.rich.width:
            self._blocks(title, columns, rows)  # a truncated number is worse than long output
        else:
            self.rich.print(table, soft_wrap=False)

    def _blocks(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table too wide for the terminal row by row."""
        self.say(title)
        for row in rows:
            self.say(str(row[0]))
            for column, cell in zip(columns[1:], row[1:], strict=True):
                if str(cell):
                    self.say(f"  {column}: {cell}")

    def result(self, content: dict[str, Any]) -> None:
        """With --json, print `content` as the one JSON object on stdout."""
        if self.as_json:
            sys.stdout.write(as_json(content))

    @contextmanager
    def progress(self, title: str, *, rarely: bool = False) -> Iterator[Callable[[int], "Bar"]]:
        """Yield `bar(total)`, which shows a bar from its first call on, with rate, time left and a note.

        Without a terminal it prints plain lines now and then, or `rarely`. Work shorter than QUICK leaves no trace.
        """
        shown: list[Bar] = []
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
        )
        live = Noted(*columns, console=self.rich, speed_estimate_period=SPEED)

        def bar(total: int) -> Bar:
            if not shown:
                if self.rich.is_interactive:
                    live.start()
                    shown.append(RichBar(live, title, total))
                else:
                    shown.append(PlainBar(self, title, total, rarely=rarely))
            return shown[0]

        try:
            yield bar
        finally:
            if self.rich.is_interactive:  # elsewhere it would print an empty line
                live.live.transient = all(task.elapsed is None or task.elapsed < QUICK for task in live.tasks)
                live.stop()

    @contextmanager
    def working(self, title: str) -> Iterator[None]:
        """Show on a terminal the time spent on work whose progress is unknown."""
        if not self.rich.is_interactive:
            yield
            return
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=self.rich, transient=True) as live:
            live.add_task(_cell(title), total=None)
            yield


def _clock(seconds: float) -> str:
    """Format a time as rich does: 1:02:03."""
    return str(timedelta(seconds=round(seconds)))


def _cell(content: object) -> str:
    """Escape `content` so that rich shows it literally."""
    return escape(visible(content))


class Bar:
    """Receives the progress of long work: `update(done, note)`; `note` holds loss, score, rate."""

    def update(self, done: float, note: str = "") -> None:
        """Show that `done` of the total is done."""


class Noted(Progress):
    """Bars, each with its note below, where it takes no space from the numbers."""

    def get_renderables(self) -> Iterator[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if task.fields["note"]:
                yield Text(task.fields["note"])


class RichBar(Bar):
    """A live bar on a terminal."""

    def __init__(self, progress: Progress, title: str, total: int):
        self.live = progress
        self.task = progress.add_task(_cell(title), total=total, note="")

    def update(self, done: float, note: str = "") -> None:
        self.live.update(self.task, completed=done, note=visible(note))


class PlainBar(Bar):
    """Prints a line for each twentieth of the work, at least SOON after the last, and whenever RARELY has passed.

    With `rarely` only the latter.
    """

    def __init__(self, console: Console, title: str, total: int, *, rarely: bool = False):
        self.console, self.title, self.total = console, title, total
        self.every, self.rarely = max(1, total // 20), rarely
        self.patience = RARELY if rarely else SOON
        self.next: float = self.every
        self.before: float | None = None  # progress at the first update
        self.first: tuple[float, float] | None = None  # time and progress of the first advance: rates count from there
        self.began = self.said = math.inf  # times of the beginning and of the last line

    def update(self, done: float, note: str = "") -> None:
        now = time.monotonic()
        self.began, self.said = min(self.began, now), min(self.said, now)
        self.before = done if self.before is None else self.before
        if self.first is None and done > self.before:
            self.first = now, done
        twentieth = not self.rarely and (done == self.total or (done >= self.next and now - self.said >= SOON))
        due = twentieth or now - self.said >= self.patience
        if now - self.began < QUICK or not due:
            return
        since, first = self.first or (now, done)
        left = (now - since) / (done - first) * (self.total - done) if first < done < self.total else 0
        told = [note, f"{_clock(left)} left" if left >= 1 else ""]
        self.console.say(f"{self.title} {int(done)}/{self.total} {', '.join(filter(None, told))}".rstrip())
        self.said, self.patience = now, RARELY
        self.next = done + self.every if done != self.total else done + 1
