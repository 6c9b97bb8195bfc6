"A server's log, a registry that writes itself down, and a monitor over both."

import copy
import json
from pathlib import Path

import numpy as np

from llmkit.core.params import load_params
from llmkit.monitor.policy import read_monitor
from llmkit.monitor.state import Memory
from llmkit.monitor.watch import Monitor
from llmkit.rollout.controller import Controller
from llmkit.rollout.store import Store
from llmkit.serve.events import KINDS, Events

ROOT = Path(__file__).resolve().parents[2]
SECTION = load_params(ROOT / "params.yaml", "monitor")


def section(**parts):
    "The project's policy with other values: window={'requests': 60}."
    out = copy.deepcopy(SECTION)
    for name, values in parts.items():
        out[name] |= values
    return out


SMALL = section(
    window={"requests": 60, "min_n": 30}, reference={"requests": 180}, fairness={"windows": 10, "min_n": 10, "gap": 0.05},
    calibration={"windows": 10, "start": 0.0}, retrain={"labelled": 1},
)  # fmt: skip


class Ledger:
    "A registry in a file: a line for each move that changed something."

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.exists():
            self.path.write_text("{}\n")

    def lines(self):
        return [json.loads(x) for x in self.path.read_text().splitlines()]

    def aliases(self):
        return {x["alias"]: x["release"] for x in self.lines()[1:]}

    def move(self, effect):
        if self.aliases().get(effect.alias) != effect.release:
            with open(self.path, "a") as f:
                f.write(json.dumps({"alias": effect.alias, "release": effect.release, "action": effect.action, "who": effect.who}) + "\n")  # fmt: skip


class Town:
    "Requests, feedback and a clock that is turned by hand."

    def __init__(self, folder, rules=SMALL, memory=Memory, registry=Ledger, **more):
        self.folder, self.now = Path(folder), 0.0
        self.folder.mkdir(exist_ok=True)
        self.events = Events(self.folder / "events.db", lambda: self.now)
        self.settings = self.folder / "settings.ini"
        if not self.settings.exists():
            keys = {"events_db": "events.db", "monitor_db": "monitor.db", "rollouts": "r.db", "texts_db": "texts.db", "retrain": "retrain", "monitor": "latest", "tracking_uri": "m.db"}  # fmt: skip
            lines = [f"{k} = {'sqlite:///' if k == 'tracking_uri' else ''}{self.folder / v}" for k, v in keys.items()]
            self.settings.write_text("\n".join(["[DEFAULT]", *lines, ""]))
        self.registry = registry(self.folder / "ledger.jsonl")
        self.monitor = Monitor(
            read_monitor(rules), self.events, memory(self.folder / "monitor.db"), None, str(self.settings), self.folder / "retrain",
            self.folder / "latest", self.folder / "dataset", self.registry, lambda: self.now, **more,
        )  # fmt: skip

    def send(self, n, release="sha256:a", refuses=0.05, worse=0.0, said=0.5, seed=0, lacks=(), variant="baseline"):
        "Requests a second apart, feedback at once, and the time of the label lag."
        rng = np.random.default_rng([seed, int(self.now)])
        base = dict.fromkeys(KINDS["request"].split()) | {"kind": "request", "status": "ok", "code": 200, "variant": variant}  # fmt: skip
        for _ in range(n):
            self.now += 1
            c, old = float(rng.beta(8, 2)), bool(rng.random() < 0.3)
            seen = {
                "time": self.now, "id": f"q{self.now:.0f}", "release": release, "refused": bool(rng.random() < refuses),
                "prompt_tokens": int(rng.poisson(20)), "completion_tokens": int(rng.poisson(9)), "confidence": c,
                "surprisal": float(rng.gamma(2)), "label": str(rng.choice(["card", "fee"])), "group": "65+" if old else "18-30",
            }  # fmt: skip
            self.events.append(base | {k: v for k, v in seen.items() if k not in lacks})
            if rng.random() < said:
                self.events.feedback(f"q{self.now:.0f}", success=bool(rng.random() < c - worse * old))
        self.now += 100

    def promoted(self, old="sha256:a", new="sha256:b"):
        "A rollout that has brought a release, by hand."
        rules = load_params(ROOT / "params.yaml", "rollout")
        rules["steps"] = rules["steps"][-2:]
        store = Store(self.folder / "r.db")
        store.create("bank-2", rules)
        c = Controller(store, "bank-2", self.registry, lambda: self.now)
        c.command("start", "ann", model="bank", releases={"baseline": old, "canary": new})
        self.now += 61
        for i in range(1000):
            v, r = ("canary", new) if i % 2 else ("baseline", old)
            c.observe({"kind": "request", "time": self.now, "id": f"c{i}", "variant": v, "release": r, "unit": f"u{i}", "key": "k",
                       "code": 200, "status": "ok", "latency": 0.1, "ttft": 0.05, "prompt_tokens": 40, "completion_tokens": 9,
                       "finish": "stop", "fallback": False, "refused": False, "cost": None, "reason": None})  # fmt: skip
        assert c.step().phase == "Healthy"
        store.close()
