"""A headless Chromium, spoken to through a pipe (the DevTools protocol), for tests of pages."""

import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
SECONDS = 60.0


def find() -> str | None:
    """The browser, where there is one."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class Browser:
    """One tab. `asked` are the addresses it wanted to load, `complaints` what its console said, of the last page."""

    def __init__(self, requests: int, answers: int):
        self.requests, self.answers, self.buffer = requests, answers, b""
        self.number, self.session = 0, None
        self.asked: list[str] = []
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command; events that come before it are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.requests, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self.number:
                assert "error" not in found, found
                return dict(found["result"])

    def open(self, page: Path, *, width: int = 1100, media: str = "") -> None:
        """Load a page whole, in a window of this many pixels, as on a screen or as in print."""
        self.asked, self.complaints, self.loaded = [], [], False
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Emulation.setEmulatedMedia", media=media)
        self.call("Page.navigate", url=page.as_uri())
        while not self.loaded:
            self._read()
        self.value("1")  # whatever the page provoked is told by now

    def value(self, expression: str) -> Any:
        """What an expression gives in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def _read(self) -> dict[str, Any]:
        until = time.monotonic() + SECONDS
        while b"\0" not in self.buffer:
            more = os.read(self.answers, 1 << 20)
            assert more, "the browser has ended"
            assert time.monotonic() < until, "the browser does not answer"
            self.buffer += more
        line, _, self.buffer = self.buffer.partition(b"\0")
        found = dict(json.loads(line))
        params = found.get("params", {})
        if found.get("method") == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif found.get("method") == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        elif found.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            self.complaints.append(str(params))
        elif found.get("method") == "Page.loadEventFired":
            self.loaded = True
        return found


@contextmanager
def browser(program: str, profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile, ended at the end."""
    (there, requests), (answers, back) = os.pipe(), os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (there, back)]  # out of the way of 3 and 4
    actions = [
        *((os.POSIX_SPAWN_DUP2, end, number) for end, number in zip(ends, (3, 4), strict=True)),  # where it listens
        *((os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)),
    ]
    words = [program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
    process = os.posix_spawn(program, words, os.environ, file_actions=actions)
    for end in (there, back, *ends):
        os.close(end)
    try:
        yield Browser(requests, answers)
    finally:
        os.close(requests)
        os.close(answers)
        os.kill(process, signal.SIGTERM)
        os.waitpid(process, 0)
