"""A Chromium without a window, driven over its debugging protocol: `with Browser(folder) as b: b.open(url); b.js("document.title")`."""
import base64
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser():
    "The program of a browser; the test is skipped where there is none."
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser to open the page in: none of {', '.join(BROWSERS)} is on PATH")
    return program


class Browser:
    "Asks nobody but this machine, and has a camera that shows `film`, a file of JPEG pictures one after the other."
    def __init__(self, folder, film=None):
        self.program = find_browser()
        self.profile, self.film, self.number, self.events, self.connection = Path(folder) / "profile", film, 0, [], ExitStack()

    def __enter__(self):
        from websockets.sync.client import connect
        camera = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
        if self.film: camera.append(f"--use-file-for-fake-video-capture={self.film}")
        self.process = subprocess.Popen([self.program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                                         "--remote-debugging-port=0", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
                                         f"--user-data-dir={self.profile}", *camera, "about:blank"],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = self.profile / "DevToolsActivePort"
        self._until(lambda: port.is_file() and "\n" in port.read_text(), 60)
        with urllib.request.urlopen(f"http://127.0.0.1:{port.read_text().splitlines()[0]}/json") as answer:
            page = next(t for t in json.load(answer) if t["type"] == "page")
        self.socket = self.connection.enter_context(connect(page["webSocketDebuggerUrl"], max_size=2**28))
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error):
        self.connection.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @staticmethod
    def _until(condition, seconds):
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, "waited too long"
            time.sleep(.2)
        return found

    def call(self, method, **params):
        "One command of the protocol; events that come meanwhile are kept."
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=120))
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def js(self, code):
        "The value of an expression."
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, code, seconds=120):
        "Wait until an expression is true."
        try:
            return self._until(lambda: self.js(f"!!({code})"), seconds)
        except AssertionError:
            raise AssertionError(f"never became true: {code}\n{self.js('document.body.innerText')[:2000]}") from None

    def open(self, url, width=1200, height=900, dark=False):
        "Open a page in a window of this size; below 600 pixels it is a telephone."
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def upload(self, selector, path):
        "Choose a file."
        self.call("DOM.enable")
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"])

    def picture(self, path, whole=True):
        "Save what is seen."
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]))

    def asked(self):
        "The addresses that were asked for."
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def complaints(self):
        "Errors in scripts, and on the console."
        texts = [e["params"]["entry"]["text"] for e in self.events if e["method"] == "Log.entryAdded" and e["params"]["entry"]["level"] == "error"]
        texts += [e["params"]["exceptionDetails"]["text"] for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        return texts + [str(e["params"]["args"]) for e in self.events if e["method"] == "Runtime.consoleAPICalled" and e["params"]["type"] == "error"]
