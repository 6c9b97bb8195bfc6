"""No network unless asked: the pipeline up to the engine, and the server that answers from it, on a machine that has none.

The loopback is all there is (`unshare --net`), and an audit hook in every Python process notes who looks for more: what is
asked for and quietly done without is a defect too, since elsewhere it goes out.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
# brings the loopback up, as `ip link set lo up` does, and becomes the command that follows
INSIDE = """
import fcntl, os, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    fcntl.ioctl(s, 0x8914, struct.pack("16sH14x", b"lo", 0x41))  # SIOCSIFFLAGS: IFF_UP | IFF_RUNNING
os.execvp(sys.argv[1], sys.argv[1:])
"""
BARE = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"]), sys.executable, "-S", "-c", INSIDE]
# every Python process imports it as it starts
WATCH = """
import os, socket, sys, traceback
HERE = {"", "localhost", "0.0.0.0", "::", "::1", socket.gethostname()}

def hook(event, args):
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host or ""
    if host not in HERE and not host.startswith("127."):
        with open(os.environ["ASKED"], "a") as f:
            print(event, host, "by", *sys.argv[:3], file=f)
            traceback.print_stack(limit=12, file=f)

sys.addaudithook(hook)
"""
NOT_ITS = ("CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST")  # where a library sees one of these, it does not call home
ROAD = """
timeout 1500 llmkit repro quantize
trap 'kill $!; wait $!' EXIT
llmkit serve --target artifacts/quantize/engine &
llmkit ask http://127.0.0.1:8000/v1 "Where is my card?" --max-tokens 4 > answer
llmkit ask artifacts/quantize/engine "Where is my card?" --max-tokens 4 > the-same
"""


@pytest.fixture
def offline(tmp_path):
    "Runs a script where there is no network but the loopback: its exit code and words, and who asked for another."
    try:
        probe = subprocess.run([*BARE, "true"], capture_output=True, text=True)
        denied = probe.returncode and probe.stderr.strip().rpartition("\n")[2]
    except FileNotFoundError as e:
        denied = str(e)
    if denied:
        pytest.skip(f"a network of its own is not permitted here: {denied}")
    watch, asked = tmp_path / "watch", tmp_path / "asked"
    watch.mkdir()
    (watch / "sitecustomize.py").write_text(WATCH)
    quiet = lambda k: k in NOT_ITS or k.startswith(("HF_", "MLFLOW_", "DVC_", "LLMKIT_"))
    env = {k: v for k, v in os.environ.items() if not quiet(k)} | {"HOME": str(tmp_path / "home")}
    env |= {"PYTHONPATH": str(watch), "ASKED": str(asked), "OMP_NUM_THREADS": "1"}
    env |= {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}

    def run(script, folder):
        how = {"cwd": folder, "env": env, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run([*BARE, "bash", "-euc", script], timeout=1800, **how)
        return done.returncode, done.stdout, asked.read_text() if asked.exists() else ""

    return run


@pytest.fixture
def project(tmp_path):
    "A checkout whose recipe has almost nothing to read and to learn."
    root = tmp_path / "checkout"
    for part in ("llmkit", "nbs", "baseline", ".dvc"):
        left_out = shutil.ignore_patterns("__pycache__", "tmp", "cache", "*.local")
        shutil.copytree(ROOT / part, root / part, ignore=left_out)
    for part in ("settings.ini", "pyproject.toml", "requirements.lock", "LICENSE", "dvc.yaml"):
        shutil.copy(ROOT / part, root)
    yaml = YAML()
    params = yaml.load(ROOT / "params.yaml")
    params["base"]["corpus_lines"] = 400
    params["base"]["tiny"] |= {"vocab": 512, "hidden": 64, "heads": 2, "mlp": 128, "steps": 5, "threads": 1}
    params["prepare"]["n"] = 400
    params["finetune"] |= {"rank": 4, "alpha": 4, "epochs": 1, "threads": 1}
    params["quantize"] |= {"precision": "int8", "prompts": 4, "max_tokens": 4, "metric": "answer_logprob"}
    params["quantize"]["min_recovery"] = -99.0
    yaml.dump(params, root / "params.yaml")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return root


def test_who_asks_for_the_network_is_noted_and_gets_none(offline, tmp_path):
    ask = "import socket; socket.create_connection(('{}', 80), timeout=5)"
    for host in ("example.org", "192.0.2.1"):
        code, said, asked = offline(f'python -c "{ask.format(host)}"', tmp_path)
        assert code == 1 and host in asked, said
    here = "import socket; s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname())"
    assert offline(f'python -c "{here}"', tmp_path) == (0, "", asked)


@pytest.mark.slow
def test_the_pipeline_up_to_the_engine_and_its_answers(offline, project):
    code, said, asked = offline(ROAD, project)
    assert code == 0, said[-4000:]
    assert (project / "answer").read_text() == (project / "the-same").read_text() != "", said[-4000:]
    assert not asked, asked[:4000]
