"""A headless Chromium for the tests, driven over the WebDriver protocol: https://www.w3.org/TR/webdriver2."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "ArrowUp": "\ue013", "ArrowDown": "\ue015", "ArrowRight": "\ue014"}
_FLAGS = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "hide-scrollbars",
)
_SECONDS = 60


def why_not() -> str:
    """What is missing, empty where the tests can run."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not installed (Debian: chromium, chromium-driver)" if missing else ""


class Chromium:
    """One browser with a fresh profile below `folder`, closed at the end of the `with` block."""

    def __init__(self, folder: Path, size: tuple[int, int] = (1280, 800), *, dark: bool = False) -> None:
        self.folder, self.size, self.dark = folder, size, dark

    def __enter__(self) -> Self:
        command = ["chromedriver", "--port=0"]
        self._driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._driver.stdout is not None
        line = next(line for line in self._driver.stdout if "successfully on port" in line)
        self._url = f"http://127.0.0.1:{line.split()[-1].rstrip('.')}/session"
        flags = [*_FLAGS, f"user-data-dir={self.folder}", f"window-size={self.size[0]},{self.size[1]}"]
        options = {"args": [f"--{flag}" for flag in flags]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._post("", {"capabilities": {"alwaysMatch": wanted}})
        self._url += f"/{session['sessionId']}"
        self._post("/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": self._media()})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._request("DELETE", "")
        self._driver.terminate()
        self._driver.wait()
        if self._driver.stdout:
            self._driver.stdout.close()

    def _media(self) -> dict[str, Any]:
        return {"features": [{"name": "prefers-color-scheme", "value": "dark" if self.dark else "light"}]}

    def open(self, path: Path) -> None:
        """Load a file and wait until its page says that it is ready."""
        self._post("/url", {"url": path.as_uri()})
        ready = "const done = arguments[0]; const look = () => document.documentElement.dataset.ready ? done(1) : "
        self._post("/execute/async", {"script": f"{ready}setTimeout(look, 20); look()", "args": []})

    def run(self, script: str, *args: Any) -> Any:
        """What a JavaScript expression of `arguments` comes to."""
        return self._post("/execute/sync", {"script": f"return {script}", "args": list(args)})

    def press(self, *keys: str) -> None:
        """Press keys after each other; other than letters are those of `KEYS`."""
        codes = [KEYS.get(key, key) for key in keys]
        actions = [{"type": kind, "value": code} for code in codes for kind in ("keyDown", "keyUp")]
        self._post("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def type(self, text: str) -> None:
        """Press the letters of `text`."""
        self.press(*text)

    def click(self, selector: str) -> None:
        """Click in the middle of the first element, through what a user would hit there."""
        found = self._post("/element", {"using": "css selector", "value": selector})
        self._post(f"/element/{next(iter(found.values()))}/click", {})

    def text(self, selector: str) -> str:
        """The text of the first element."""
        return self.run("document.querySelector(arguments[0]).textContent", selector)

    def count(self, selector: str) -> int:
        """How many elements there are."""
        return self.run("document.querySelectorAll(arguments[0]).length", selector)

    def errors(self) -> list[str]:
        """What the console had to complain about since the last call."""
        entries = self._post("/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def screenshot(self, path: Path) -> None:
        """Save what the window shows as PNG."""
        path.write_bytes(base64.b64decode(self._request("GET", "/screenshot")))

    def _post(self, path: str, data: dict[str, Any]) -> Any:
        return self._request("POST", path, data)

    def _request(self, method: str, path: str, data: dict[str, Any] | None = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self._url + path, body, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {json.load(error)['value']['message']}") from None
