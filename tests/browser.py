"""A headless Chromium, spoken to by Chrome's DevTools protocol over two pipes: JSON messages that end in NUL."""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
EXECUTABLE = next((found for found in map(shutil.which, NAMES) if found), None)
NO_BROWSER = f"no browser is installed: none of {', '.join(NAMES)} is on the PATH"
_TIMEOUT_S = 60
# The browser reads commands from descriptor 3 and writes to 4.
_LAUNCH = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(text), fcntl.F_DUPFD, 10) for text in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-default-apps", "--disable-extensions", "--disable-sync", "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)  # fmt: skip
_KEY_CODES = {
    "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Escape": 27, "Tab": 9,
    "PageUp": 33, "PageDown": 34, "Home": 36, "End": 35, " ": 32,
}  # fmt: skip


class PageError(AssertionError):
    """JavaScript raised an error, or the browser refused a command."""


class Page:
    """A tab. `requests` are the URLs that it asked for, `errors` what it wrote to the console or refused."""

    def __init__(self, send):
        self._send = send
        self.requests = []
        self.errors = []

    def command(self, method, **params):
        return self._send(method, params)

    def open(self, path):
        """Loads a file; returns when it has `data-ready`, whose value is milliseconds since navigation."""
        self.command("Page.navigate", url=path.absolute().as_uri())
        return int(self.wait("document.documentElement.dataset.ready"))

    def evaluate(self, expression):
        """The value of a JavaScript expression; of a promise, what it resolves to."""
        found = self.command(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise PageError(details.get("exception", {}).get("description", details["text"]))
        return found["result"].get("value")

    def wait(self, expression):
        """Returns the value of an expression as soon as it is true."""
        end = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < end:
            with contextlib.suppress(PageError):  # the scripts may not have run yet
                if value := self.evaluate(expression):
                    return value
            time.sleep(0.02)
        raise PageError(f"{expression} did not come true in {_TIMEOUT_S} s: {self.errors}")

    def settle(self):
        """Returns when what was changed is drawn."""
        self.evaluate(
            "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
        )

    def mouse(self, selector, x, y, *, click=False):
        """Moves the pointer to a place of an element, in fractions of its size, and may click there."""
        at = self._place(selector, x, y)
        self.command("Input.dispatchMouseEvent", type="mouseMoved", **at)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.command("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)
        self.settle()

    def tap(self, selector, x, y):
        """Touches a place of an element."""
        self.command("Emulation.setTouchEmulationEnabled", enabled=True)
        at = self._place(selector, x, y)
        self.command("Input.dispatchTouchEvent", type="touchStart", touchPoints=[at])
        self.command("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self.settle()
        self.command("Emulation.setTouchEmulationEnabled", enabled=False)

    def _place(self, selector, x, y):
        left, top = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect(); "
            f"return [b.left + {x} * b.width, b.top + {y} * b.height]; }})()"
        )
        return {"x": left, "y": top}

    def press(self, *keys):
        """Presses keys by their names, such as "ArrowLeft" or "h"."""
        for key in keys:
            typed = {"text": key} if len(key) == 1 else {}
            code = {"windowsVirtualKeyCode": _KEY_CODES.get(key, ord(key[0].upper()))}
            self.command("Input.dispatchKeyEvent", type="keyDown", key=key, **typed, **code)
            self.command("Input.dispatchKeyEvent", type="keyUp", key=key, **code)
        self.settle()

    def resize(self, width, height, *, mobile=False, dark=False):
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])
        self.settle()

    def screenshot(self, path, *, whole=True):
        found = self.command("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def browser(profile):
    """Yields a new `Page`; `profile` is an empty folder."""
    to_read, our_write = os.pipe()
    our_read, to_write = os.pipe()
    flags = [*_FLAGS, f"--user-data-dir={profile}", "about:blank"]
    command = [sys.executable, "-c", _LAUNCH, str(to_read), str(to_write), EXECUTABLE, *flags]
    process = subprocess.Popen(
        command,
        pass_fds=(to_read, to_write),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(to_read)
    os.close(to_write)
    try:
        yield _new_page(our_read, our_write)
    finally:
        os.close(our_write)  # the browser ends when its pipe does
        os.close(our_read)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _new_page(read, write):
    numbers, rest = itertools.count(1), bytearray()
    page = None

    def messages():
        end = time.monotonic() + _TIMEOUT_S
        while True:
            while (zero := rest.find(0)) >= 0:
                message = json.loads(rest[:zero])
                del rest[: zero + 1]
                yield message
            if not select.select([read], [], [], max(0, end - time.monotonic()))[0]:
                raise PageError(f"the browser said nothing for {_TIMEOUT_S} s")
            if not (chunk := os.read(read, 2**20)):
                raise PageError("the browser has ended")
            rest.extend(chunk)

    def send(method, params, session=None):
        number = next(numbers)
        message = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(write, json.dumps(message).encode() + b"\0")
        for answer in messages():
            if answer.get("id") == number:
                if "error" in answer:
                    raise PageError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            if page is not None:
                _note(page, answer)
        raise AssertionError

    targets = send("Target.getTargets", {})["targetInfos"]
    tab = next(target["targetId"] for target in targets if target["type"] == "page")
    session = send("Target.attachToTarget", {"targetId": tab, "flatten": True})["sessionId"]
    page = Page(lambda method, params: send(method, params, session))
    for domain in ("Page", "Runtime", "Network", "Log"):
        page.command(f"{domain}.enable")
    return page


def _note(page, event):
    params = event.get("params", {})
    match event.get("method"):
        case "Network.requestWillBeSent":
            page.requests.append(params["request"]["url"])
        case "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            page.errors.append(details.get("exception", {}).get("description", details["text"]))
        case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning"):
            page.errors.append(str([part.get("value") for part in params["args"]]))
        case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
            page.errors.append(params["entry"]["text"])
