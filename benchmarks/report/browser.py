"""A headless Chromium of this machine, driven through a pair of pipes: no port is opened, no driver or library needed.

It speaks the Chrome DevTools Protocol (https://chromedevtools.github.io/devtools-protocol/): messages of JSON, each
ended by a zero byte, the browser's ear on file 3 and its mouth on file 4.
"""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
# Gives the two pipes the numbers that the browser expects, and becomes the browser.
_LAUNCHER = """\
import os, sys
ear, mouth = (os.dup(int(fd)) for fd in sys.argv[1:3])
while ear < 5 or mouth < 5:
    ear, mouth = os.dup(ear), os.dup(mouth)
os.dup2(ear, 3)
os.dup2(mouth, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_PATIENCE_SECONDS = 60.0


class NoBrowser(RuntimeError):
    """There is no Chromium on this machine."""


def find_browser() -> str:
    """Its path: what CHROMIUM names, else the first one that is found."""
    named = os.environ.get("CHROMIUM")
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        raise NoBrowser(
            f"no Chromium {f'at {named!r}' if named else 'on this machine'}: install it"
            " (on Debian: apt-get install chromium), or name one with CHROMIUM=/path/to/chrome"
        )
    return found


class Browser:
    """The browser process, with a fresh profile that goes when it ends. A context manager."""

    def __init__(self) -> None:
        self.path = find_browser()
        self.heard: list[dict[str, Any]] = []  # events, in their order
        self._profile = tempfile.TemporaryDirectory(prefix="fleetpress-chromium-", ignore_cleanup_errors=True)
        self._rest = b""
        self._number = 0

    def __enter__(self) -> Self:
        ear, self._mouth = os.pipe()
        self._ear, mouth = os.pipe()
        arguments = (self.path, *_ARGUMENTS, f"--user-data-dir={self._profile.name}")
        self._process = subprocess.Popen(
            (sys.executable, "-I", "-S", "-c", _LAUNCHER, str(ear), str(mouth), *arguments),
            pass_fds=(ear, mouth),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(ear)
        os.close(mouth)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with suppress(OSError, RuntimeError, subprocess.TimeoutExpired):
                self.call("Browser.close")
                self._process.wait(10)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # what it has left behind, in its own session
            self._process.wait()
            os.close(self._ear)
            os.close(self._mouth)
            self._profile.cleanup()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Ask for something and wait for the answer."""
        self._number += 1
        asked: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            asked["sessionId"] = session
        os.write(self._mouth, json.dumps(asked).encode() + b"\0")
        ends_at = time.monotonic() + _PATIENCE_SECONDS
        while (message := self._read(ends_at)).get("id") != self._number:
            self.heard.append(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        found: dict[str, Any] = message["result"]
        return found

    def wait_for(self, method: str, session: str) -> None:
        """Until an event has been heard, now or before."""
        ends_at = time.monotonic() + _PATIENCE_SECONDS
        while not any(
            event.get("method") == method and event.get("sessionId") == session for event in self.heard
        ):
            self.heard.append(self._read(ends_at))

    def _read(self, ends_at: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._ear], [], [], max(0.0, ends_at - time.monotonic()))
            data = os.read(self._ear, 1 << 16) if ready else b""
            if not data:
                raise RuntimeError(f"{self.path} {'does not answer' if not ready else 'has ended'}")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def open(self, page: Path, *, width: int = 1360, height: int = 900, dark: bool = False) -> "Page":
        """A file of this machine in a tab of its own, when it has been loaded."""
        return Page(self, page.absolute().as_uri(), width=width, height=height, dark=dark)


class Page:
    """A tab: what it shows, what it complained about, and what it fetched."""

    def __init__(self, browser: Browser, url: str, *, width: int, height: int, dark: bool) -> None:
        self._browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Page.navigate", url=url)
        browser.wait_for("Page.loadEventFired", self._session)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def run(self, script: str) -> Any:
        """The value of a script in the page, which may be a promise."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description", "the script failed"))
        return found["result"].get("value")

    def click(self, selector: str) -> None:
        """As with a mouse, in the middle of the first element that the selector finds."""
        box = self.run(
            f"(() => {{ const it = document.querySelector({json.dumps(selector)}); "
            "it.scrollIntoView({block: 'center', behavior: 'instant'}); const box = it.getBoundingClientRect(); "
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def move_to(self, x: float, y: float) -> None:
        """The mouse."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        """A key such as Tab, Enter, Escape."""
        code = {"Tab": 9, "Enter": 13, "Escape": 27}[key]
        shared = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        text = {"text": "\r"} if key == "Enter" else {}
        self._call("Input.dispatchKeyEvent", type="keyDown", **shared, **text)
        self._call("Input.dispatchKeyEvent", type="keyUp", **shared)

    def type(self, text: str) -> None:
        """Into the element that has the focus."""
        self._call("Input.insertText", text=text)

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, the policy and the scripts."""
        self.run("new Promise((done) => setTimeout(done, 50))")  # what is about to be said is heard, too
        found = []
        for event in self._events("Runtime.exceptionThrown"):
            found.append(str(event["exceptionDetails"]))
        for event in self._events("Runtime.consoleAPICalled"):
            found.append(str(event["args"]))
        for event in self._events("Log.entryAdded"):
            found.append(str(event["entry"]["text"]))
        return found

    def requests(self) -> list[str]:
        """Addresses that were asked for, the page itself first."""
        return [event["request"]["url"] for event in self._events("Network.requestWillBeSent")]

    def _events(self, method: str) -> list[dict[str, Any]]:
        return [
            event["params"]
            for event in self._browser.heard
            if event.get("method") == method and event.get("sessionId") == self._session
        ]

    def print(self) -> bytes:
        """As a PDF."""
        return base64.b64decode(
            self._call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"]
        )

    def picture(self, *, whole: bool = False, height: int | None = None) -> bytes:
        """What it shows, as a PNG: the window, or the `whole` page, or so many pixels of it from the top."""
        options: dict[str, Any] = {"format": "png"}
        if whole or height is not None:
            size = self._call("Page.getLayoutMetrics")["cssContentSize"]
            tall = size["height"] if height is None else min(height, size["height"])
            clip = {"x": 0, "y": 0, "width": size["width"], "height": tall, "scale": 1}
            options |= {"captureBeyondViewport": True, "clip": clip}
        return base64.b64decode(self._call("Page.captureScreenshot", **options)["data"])
