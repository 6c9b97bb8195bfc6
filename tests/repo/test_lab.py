"`make lab` opens JupyterLab whose kernel imports the kit."

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import pytest
import websocket

ROOT = Path(__file__).parents[2]


@pytest.fixture
def lab(tmp_path):
    "The address and the token of a running one."
    env = os.environ | {"JUPYTER_RUNTIME_DIR": str(tmp_path), "JUPYTER_CONFIG_DIR": str(tmp_path)}
    words = ["make", "lab", f"VENV={sys.prefix}", "LAB_ARGS=--no-browser --port=0"]
    with open(tmp_path / "log.txt", "wb") as log:
        p = subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + 90
        while not (found := list(tmp_path.glob("jpserver-*.json"))):
            assert p.poll() is None and time.monotonic() < end, (tmp_path / "log.txt").read_text()
            time.sleep(0.2)
        said = json.loads(found[0].read_text())
        yield said["url"].rstrip("/"), said["token"]
    finally:
        os.killpg(p.pid, signal.SIGTERM)
        p.wait(30)


def call(lab, path, body=None):
    "The JSON of a request."
    data = None if body is None else json.dumps(body).encode()
    r = urllib.request.Request(lab[0] + path, data, {"Authorization": f"token {lab[1]}"})
    with urllib.request.urlopen(r, timeout=30) as answer:
        return json.load(answer)


def run(lab, code):
    "What a cell prints in the default kernel."
    kernel = call(lab, "/api/kernels", {})["id"]
    address = re.sub("^http", "ws", lab[0]) + f"/api/kernels/{kernel}/channels?token={lab[1]}"
    head = {"msg_id": uuid.uuid4().hex, "username": "", "session": "s", "msg_type": "execute_request", "version": "5.3"}
    ask = {"header": head, "parent_header": {}, "metadata": {}, "content": {"code": code}, "channel": "shell"}
    ws, out = websocket.create_connection(address, timeout=60), ""
    ws.send(json.dumps(ask))
    while True:
        m = json.loads(ws.recv())
        if m["parent_header"].get("msg_id") != head["msg_id"]:
            continue
        out += m["content"].get("text", "") if m["msg_type"] == "stream" else ""
        assert m["msg_type"] != "error", m["content"]
        if m["msg_type"] == "execute_reply":
            ws.close()
            return out


def test_lab_has_the_kernel_of_the_environment_and_sees_the_notebooks(lab):
    spec = call(lab, "/api/kernelspecs")
    assert spec["kernelspecs"][spec["default"]]["spec"]["display_name"] == "llmkit"
    said = run(lab, "import sys, llmkit.gate.judge as j; print(sys.prefix, j.__file__)").split()
    assert said == [sys.prefix, str(ROOT / "llmkit/gate/judge.py")]
    assert "01_core" in [x["name"] for x in call(lab, "/api/contents/nbs?content=1")["content"]]
