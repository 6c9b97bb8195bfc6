"Debian's Chromium, driven through the WebDriver protocol that its driver speaks over HTTP."

import base64
import os
import subprocess
from contextlib import contextmanager

import httpx
from serve_server import until


class Browser:
    "One window."

    def __init__(self, client, session):
        self.client, self.path = client, f"/session/{session}"

    def call(self, method, path, **body):
        "A command of the protocol; gives its value."
        got = self.client.request(method, self.path + path, json=body if method == "POST" else None).json()
        assert not (isinstance(got["value"], dict) and "error" in got["value"]), got["value"]
        return got["value"]

    def open(self, url):
        "Go to a page."
        self.call("POST", "/url", url=url)

    def run(self, script, *args):
        "The value of a script, which returns it."
        return self.call("POST", "/execute/sync", script=script, args=list(args))

    def text(self, selector):
        "The visible text of an element, or nothing where there is none."
        return self.run("const e = document.querySelector(arguments[0]); return e ? e.innerText : ''", selector)

    def cdp(self, command, **params):
        "A command of the developer tools."
        return self.call("POST", "/goog/cdp/execute", cmd=command, params=params)

    def size(self, width, height, dark=False):
        "Be as wide and high as a device, and light or dark."
        self.cdp(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.cdp("Emulation.setEmulatedMedia", features=scheme)

    def picture(self, path):
        "A picture of the whole page."
        shot = self.cdp("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self):
        "What the browser says of the page: errors, refused scripts and styles."
        return [e["message"] for e in self.call("POST", "/se/log", type="browser") if e["level"] == "SEVERE"]


@contextmanager
def browser(folder):
    "A browser with a profile of its own."
    with open(folder / "driver.log", "w+b") as log:
        driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=log, stderr=log)
        try:
            said = lambda: (folder / "driver.log").read_text()
            until(lambda: "started successfully on port" in said(), "the driver")
            port = said().split("started successfully on port ")[1].split(".")[0]
            flags = [
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                f"--user-data-dir={folder}/profile",
            ]
            options = (
                {"args": flags, "binary": "/usr/bin/chromium"}
                if os.path.exists("/usr/bin/chromium")
                else {"args": flags}
            )
            caps = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                made = client.post("/session", json={"capabilities": {"alwaysMatch": caps}}).json()["value"]
                assert "sessionId" in made, made
                window = Browser(client, made["sessionId"])
                try:
                    yield window
                finally:
                    client.delete(window.path)
        finally:
            driver.terminate()
            driver.wait(10)
