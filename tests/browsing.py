"""A headless Chromium for tests, driven over its debugging pipe: no driver, no extra package.

With ``--remote-debugging-pipe`` the browser reads commands of the Chrome DevTools Protocol from
file descriptor 3 and answers on 4, each message JSON ended by a zero byte. So a test needs no
port, no WebSocket and no Selenium. Every wait has a deadline, and the browser's whole process
group is killed at the end, whatever happened.

Protocol: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["Browser", "find_browser"]

_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
_SWITCHES = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # the sandbox refuses root, which containers run as
    "--disable-dev-shm-usage",  # containers give /dev/shm 64 MiB
    "--disable-gpu",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--window-size=1280,1600",
)
# Puts the pipes on descriptors 3 and 4. `preexec_fn` would fork a process full of jax's threads.
_SHIM = """
import fcntl, os, sys
there, back = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3])
os.dup2(there, 3), os.dup2(back, 4)
os.close(there), os.close(back)
os.execvp(sys.argv[3], sys.argv[3:])
"""
_LONGEST_SECONDS = 30.0
# What the protocol wants beside the names: https://www.w3.org/TR/uievents/#fixed-virtual-key-codes
_KEYS = {
    "Tab": 9,
    "Enter": 13,
    "End": 35,
    "Home": 36,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
}


def find_browser() -> str | None:
    """The path of a Chromium or Chrome; the environment variable CHROMIUM goes first."""
    named = os.environ.get("CHROMIUM")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, _NAMES)), None)


class Browser:
    """One browser with one page; a context manager.

    Args:
        path: of the program.
        profile: a folder of its own, which need not exist.
    """

    def __init__(self, path: str, profile: Path) -> None:
        self._number, self._rest, self.events = 0, b"", []
        self._deadline = time.monotonic() + _LONGEST_SECONDS
        there, self._write = os.pipe()
        self._read, back = os.pipe()
        command = [sys.executable, "-c", _SHIM, str(there), str(back), path, *_SWITCHES]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(there, back),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(there)
        os.close(back)
        self._session = ""

    def __enter__(self) -> Browser:
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the browser and all its helpers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=10)
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result; events that arrive meanwhile are kept.

        Raises:
            RuntimeError: the browser says no, or is gone.
            TimeoutError: it says nothing.
        """
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") != self._number:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']}")
            else:
                return answer["result"]

    def open(self, path: Path) -> None:
        """Load a file and wait until its own script has run."""
        self.events.clear()
        self._deadline = time.monotonic() + _LONGEST_SECONDS
        self.call("Page.navigate", url=path.as_uri())
        while self.run("document.documentElement?.dataset.ready ?? null") is None:
            time.sleep(0.05)
            if time.monotonic() > self._deadline:
                raise TimeoutError(f"{path.name} never became ready: {self.complaints()}")

    def run(self, script: str) -> Any:
        """Evaluate JavaScript in the page and return its value, as JSON has it."""
        done = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in done:
            raise RuntimeError(f"{script}: {done['exceptionDetails']}")
        return done["result"].get("value")

    def click(self, selector: str) -> None:
        """Press and release the mouse on the middle of an element, as a reader would."""
        x, y = self.hover(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, selector: str) -> tuple[float, float]:
        """Move the mouse to the middle of an element, which is brought into sight."""
        x, y = self._middle(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return x, y

    def tap(self, selector: str) -> None:
        """Touch the middle of an element, on a screen without a mouse."""
        x, y = self._middle(selector)
        self.call("Emulation.setTouchEmulationEnabled", enabled=True)
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self.call("Emulation.setTouchEmulationEnabled", enabled=False)

    def press(self, key: str) -> None:
        """Press and release a key that has a name, such as ``Tab`` or ``ArrowDown``."""
        words = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]}
        if key == "Enter":
            words["text"] = "\r"
        self.call("Input.dispatchKeyEvent", type="keyDown", **words)
        self.call("Input.dispatchKeyEvent", type="keyUp", **words)

    def type(self, selector: str, text: str) -> None:
        """Put the cursor in a field and type into it."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a select."""
        self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            f"e.value = {json.dumps(value)};"
            "e.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )

    def complaints(self) -> list[str]:
        """Errors of the page's scripts, refusals of its policy, and dialogs, so far."""
        bad = ("Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")
        return [json.dumps(e["params"]) for e in self.events if e.get("method") in bad]

    def requests(self) -> list[str]:
        """Addresses the page asked for, so far."""
        asked = [e for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in asked]

    def _middle(self, selector: str) -> tuple[float, float]:
        """Where an element's middle is in the window, once it is in sight."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        return x, y

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            left = self._deadline - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                raise TimeoutError("the browser does not answer")
            found = os.read(self._read, 1 << 16)
            if not found:
                raise RuntimeError("the browser has ended")
            self._rest += found
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)
