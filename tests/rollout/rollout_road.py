"""A policy, requests as a server writes them, a registry that writes itself down, and a clock that is turned by hand."""

import json
import multiprocessing as mp
import os
import signal
from pathlib import Path

import numpy as np
from ruamel.yaml import YAML

from llmkit.release.registry import register
from llmkit.release.release import Release
from llmkit.rollout.controller import Controller
from llmkit.rollout.store import Store

H = 3600.0
FATE = mp.get_context("fork").Value("i", -1)  # how many more points may be passed; shared with the child
RELEASES = {"baseline": "sha256:a", "canary": "sha256:b"}
SECTION = {
    "alpha": 0.05, "label_lag": "10m", "strata": [256],
    "steps": [
        {"shadow": {"percent": 100}}, {"analysis": {"min_duration": "24h", "max_duration": "72h", "min_samples": 500}},
        {"setWeight": 20}, {"analysis": {"min_duration": "1h", "max_duration": "24h", "min_samples": 100, "require": "no_harm"}},
        {"setWeight": 50}, {"analysis": {"min_duration": "1h", "max_duration": "24h", "min_samples": 400}},
    ],
    "shadow": [
        {"metric": "error_rate", "noninferiority": 0.03, "against": "baseline", "min_n": 200},
        {"metric": "label_agreement", "min": 0.85, "bound": "wilson", "min_n": 200},
        {"metric": "latency_p95", "max_ratio": 1.5, "against": "baseline"},
    ],
    "canary": [
        {"metric": "error_rate", "margin": 0.03, "hard_stop": {"max": 0.2, "min_n": 30}},
        {"metric": "latency_p95", "max_ratio": 1.6},
        {"metric": "refusal_rate", "margin": 0.06},
    ],
    "validity": {"srm_alpha": 0.001, "stale_after": "10m", "on_no_data": "inconclusive"},
    "on": {"fail": "abort", "error": "pause", "inconclusive": "pause"},
}  # fmt: skip
CANARY = SECTION | {"steps": SECTION["steps"][2:]}


def registered(folder, monkeypatch, rules, uri, name):
    "Go to a project with this policy of rollouts and two releases that Carl has registered."
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LLMKIT_ACTOR", "carl")
    Path("settings.ini").write_text(f"[DEFAULT]\ntracking_uri = {uri}\n")
    YAML().dump({"rollout": rules}, Path("params.yaml"))
    for n in (1, 2):
        register(Release(name, *(f"sha256:{x}{n}" for x in ("bundle", "verdict", "card"))), uri, f"file:///bundle{n}")


def point():
    "A moment at which the process may die."
    if FATE.value >= 0:
        FATE.value -= 1
        if FATE.value < 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Recorder:
    "A registry in a JSON file: the aliases, and a line for each real move."

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.exists():
            self.path.write_text(json.dumps({"aliases": {"champion": "sha256:a"}, "ledger": []}))

    def read(self):
        return json.loads(self.path.read_text())

    def move(self, effect):
        body = self.read()
        if body["aliases"].get(effect.alias) != effect.release:
            body["aliases"][effect.alias] = effect.release
            body["ledger"].append([effect.action, effect.alias, effect.release, effect.evidence])
        tmp = self.path.with_suffix(".tmp")
        tmp.write_text(json.dumps(body))
        tmp.replace(self.path)


class World:
    "A rollout with a clock and traffic."

    def __init__(self, folder, section=CANARY, id="r1", store=Store, registry=Recorder, begin=True):
        self.now, self.rng, self.n, self.folder = 0.0, np.random.default_rng(0), 0, Path(folder)
        self.store, self.registry = store(self.folder / "rollouts.db"), registry(self.folder / "registry.json")
        if begin:
            self.store.create(id, section)
        self.c = Controller(self.store, id, self.registry, lambda: self.now)
        if begin:
            self.c.command("start", "ann", model="bank-support", releases=RELEASES)

    def request(self, every=1.0, errors=(0.01, 0.01), slower=1.0, refusals=(0.05, 0.05), unit=None, **also):
        "One request, answered by whom the router says; errors and refusals of baseline and canary."
        self.now, self.n = self.now + every, self.n + 1
        unit = f"u{self.n}" if unit is None else unit
        v = self.c.assign(unit)
        mine = v == "canary"
        failed = bool(self.rng.random() < errors[mine])
        event = {
            "kind": "request", "time": self.now, "id": f"q{self.n}", "variant": v, "release": RELEASES[v], "unit": unit,
            "key": "k", "code": 500 if failed else 200, "status": "error" if failed else "ok",
            "latency": float(self.rng.lognormal(-1, 0.3)) * (slower if mine else 1.0), "ttft": 0.05, "prompt_tokens": 40,
            "completion_tokens": 9, "finish": "stop", "fallback": False,
            "refused": bool(self.rng.random() < refusals[mine]), "cost": None, "reason": None,
        }  # fmt: skip
        self.c.observe(event | also)
        return event

    def shadow(self, live, failed=False, slower=1.0, same=True, sampled=False):
        "What the shadow made of a copy."
        said = dict.fromkeys(("agreement", "exact", "label_same")) | {"reason": "sampled"}
        self.c.observe({
            "kind": "shadow", "time": self.now, "id": live["id"], "variant": "shadow", "release": "sha256:b",
            "result": "failed" if failed else "ok", "latency": live["latency"] * slower, "agreement": 1.0 if same else 0.2,
            "exact": same, "label_same": same, "reason": None, **(said if sampled else {}),
        })  # fmt: skip

    def traffic(self, n, step=25, **how):
        "Requests with a step of the controller now and then; returns how many until the end of the rollout."
        for i in range(n):
            self.request(**how)
            if i % step == step - 1 and self.c.step().finished:
                return i + 1
        return n

    def canary(self):
        "Requests that the canary has answered in this stage."
        arm = self.c.fold.window.arms.get("canary")
        return arm.n if arm else 0
