"Any orders, any clock, any traffic, and a process that dies anywhere: what must hold always, held."

import json
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from rollout_road import CANARY
from starlette.testclient import TestClient

from llmkit.core.errors import KitError
from llmkit.release.ledger import append, read_ledger
from llmkit.rollout.analysis import analyse
from llmkit.rollout.controller import Controller
from llmkit.rollout.fold import Fold
from llmkit.rollout.judge_server import answer, judge_app
from llmkit.rollout.policy import read_rollout
from llmkit.rollout.state import from_json
from llmkit.rollout.store import Store
from llmkit.rollout.window import window_json


class Killed(BaseException):
    "The end of a process."


class Fate:
    "How many more points may be passed."

    left = -1

    def point(self):
        self.left -= self.left >= 0
        if self.left == 0:
            self.left = -1
            raise Killed


FATE = Fate()


def deadly(do):
    "A write before and after which the process may die."

    def mortal(*args, **kwargs):
        FATE.point()
        done = do(*args, **kwargs)
        FATE.point()
        return done

    return mortal


class Mortal(Store):
    append, kept, snapshot, receive = map(deadly, (Store.append, Store.kept, Store.snapshot, Store.receive))


class Registry:
    "Aliases in a file and the real ledger; may be away, and may die in between."

    away = False

    def __init__(self, folder):
        self.aliases, self.ledger = folder / "aliases.json", folder / "ledger.jsonl"
        self.aliases.write_text(json.dumps({"champion": "sha256:a"}))
        append(self.ledger, "m", "champion", "sha256:a", "sha256:first", "register", "ann")

    def move(self, e):
        if self.away:
            raise ConnectionError("nobody answers")
        FATE.point()
        self.aliases.write_text(json.dumps(json.loads(self.aliases.read_text()) | {e.alias: e.release}))
        FATE.point()
        append(self.ledger, e.model, e.alias, e.release, e.evidence, e.action, e.who or "policy")
        FATE.point()


@st.composite
def policies(draw):
    "A section of any steps that end well, with wide margins, so that little traffic decides."
    pick = lambda *x: draw(st.sampled_from(x))
    analysis = lambda **more: {"analysis": {"min_duration": pick("0s", "5s", "30s"), "max_duration": pick("3m", "10m"), "min_samples": pick(1, 40)} | more}  # fmt: skip
    pause, share = lambda: {"pause": pick(None, {"duration": "10s"}, {"duration": "5m"})}, lambda: pick(0.01, 5.0, 20.0, 30.0)  # fmt: skip
    weight = lambda: {"setWeight": pick(share(), {"canary": share(), "b": share()}, {"canary": share(), "b": 9.0, "c": share()})}  # fmt: skip
    steps = pick([], [pause()], [{"shadow": {"percent": pick(5.0, 100.0)}}, analysis()])
    for _ in range(pick(0, 1, 2)):
        steps += [weight(), *pick([], [pause()], [analysis(require=pick("no_harm", "noninferiority"))])]
    return CANARY | {
        "alpha": 0.2, "label_lag": "5s", "strata": pick([], [16, 64]), "unit": pick("request", "user"), "stall_after": "1s",
        "steps": [*steps, weight(), analysis(), *pick([], [pause()])],
        "shadow": [{"metric": "error_rate", "noninferiority": 0.5, "against": "baseline"}],
        "canary": [{"metric": "error_rate", "margin": 0.3, "hard_stop": {"max": 0.6, "min_n": 5}}, *pick([], [{"metric": "latency_p95", "max_ratio": 9.0}], [{"metric": "task_success_rate", "margin": 0.9}])],
        "validity": {"srm_alpha": 0.001, "stale_after": pick("30s", "5m"), "on_no_data": pick("inconclusive", "error")},
        "on": {"fail": pick("abort", "pause"), "error": pick("pause", "abort"), "inconclusive": pick("pause", "abort")},
    }  # fmt: skip


dies = st.one_of(st.just(-1), st.just(-1), st.integers(1, 40))
SEEN = set()


class Machine(RuleBasedStateMachine):
    "A rollout with its log, its registry and its judge."

    @initialize(section=policies(), attends=st.booleans())
    def begin(self, section, attends):
        self.attends = attends
        self.folder, self.now, self.n, self.sent, self.checked = Path(tempfile.mkdtemp()), 1e6, 0, 0, 0
        self.policy, self.registry, self.store = read_rollout(section), Registry(self.folder), Mortal(self.folder / "r.db")  # fmt: skip
        self.releases = {"baseline": "sha256:a", **{v: f"sha256:{v}" for v in self.policy.variants}}
        self.store.create("r", section)
        self.restart()
        self.c.command("start", "ann", model="m", releases=self.releases)
        self.http = TestClient(judge_app(Store(self.folder / "r.db"), lambda: self.now))

    @rule()
    def restart(self):
        FATE.left = -1
        self.store.close()
        self.store = Mortal(self.folder / "r.db")
        self.c = Controller(self.store, "r", self.registry, lambda: self.now, attends=self.attends)

    def mortal(self, do, left):
        "Something that the process may not survive; what is refused is refused."
        FATE.left = left
        try:
            do()
        except KitError:
            pass
        except Killed:
            self.restart()
        FATE.left = -1

    def requests(self, n, seconds, bad, ago=0.0, only=""):
        for i in range(n):
            self.n += 1
            unit = f"u{self.n % 700}"
            v = self.c.assign(unit)
            if only in ("", v):
                e = {"kind": "request", "time": self.now + seconds * i / n - ago, "id": f"q{self.n}", "variant": v, "release": self.releases[v], "unit": unit, "latency": 0.1, "ttft": 0.05, "prompt_tokens": self.n % 90, "fallback": False, "refused": False}  # fmt: skip
                failed = v != "baseline" and i % 10 < 10 * bad
                yield e | {"code": 500 if failed else 200, "status": "error" if failed else "ok"}
                yield {"kind": "feedback", "time": self.now + seconds, "id": f"q{self.n - i % 2}", "success": True}
                if self.c.mirror(unit):
                    yield {"kind": "shadow", "time": self.now, "id": e["id"], "variant": "shadow", "release": "sha256:canary", "result": "failed" if bad else "ok", "latency": 0.1, "agreement": None, "exact": None, "label_same": None}  # fmt: skip

    @rule(rounds=st.integers(1, 6), gap=st.sampled_from([5.0, 40.0]), bad=st.sampled_from([0, 0, 0, 0.5]), left=dies)
    def good_and_bad_days(self, rounds, gap, bad, left):
        def live():
            for _ in range(rounds):
                for e in self.requests(80, gap, bad):
                    self.c.observe(e)
                self.now += gap
                self.c.step()

        self.mortal(live, left)

    @rule(ago=st.sampled_from([0.0, 60.0, 5e3, -5e3]), only=st.sampled_from(["", "", "baseline", "canary"]), left=dies)
    def of_a_gateway(self, ago, only, left):
        "Its events come late, from another clock, turned round, of one arm, and twice."
        events = list(enumerate(reversed(list(self.requests(40, 10.0, 0, ago, only))), self.sent + 1))
        self.mortal(lambda: [self.store.receive("g", "m", events, self.now) for _ in range(2)], left)
        self.sent = (self.store.rows("select seen from sources") or [(0,)])[0][0]

    @rule(seconds=st.sampled_from([1.0, 31.0, 700.0, -1.0, -4e3]))
    def clock(self, seconds):
        self.now += seconds

    @rule(left=dies)
    def tick(self, left):
        self.mortal(self.c.step, left)

    @rule(kind=st.sampled_from(["pause", "resume", "resume", "promote", "abort", "retry", "retry", "undo"]), full=st.booleans(), left=dies)  # fmt: skip
    def order(self, kind, full, left):
        "From another process."
        more = {"full": full} if kind == "promote" else {}
        self.mortal(lambda: Controller(self.store, "r", self.registry, lambda: self.now).command(kind, "ben", **more), left)  # fmt: skip

    @rule(away=st.booleans())
    def registry_is(self, away):
        self.registry.away = away

    @invariant()
    def log_holds(self):
        if not hasattr(self, "c"):
            return
        fold, before = Fold(self.policy), None
        for seq, kind, body, said in self.store.rows("select seq, kind, body, state from events order by seq"):
            after, event = from_json(json.loads(said)) if said else None, json.loads(body)
            if after and before and seq > self.checked:
                self.step_holds(before, after, kind, event, fold)
            fold.apply(event, after)
            before = after or before
        self.checked = seq
        loaded = self.store.load("r")
        assert loaded.state == before == self.store.standing("r") == self.store.replay("r").state
        assert window_json(loaded.window) == window_json(fold.window)
        self.store.catch_up("r", self.c.fold)
        said = answer(self.c.fold, self.now)
        assert said == answer(loaded, self.now)
        assert self.http.get("/v1/rollouts/r/verdict").json() == json.loads(json.dumps(said, allow_nan=False))

    def step_holds(self, a, b, kind, event, fold):
        "What one decision may do."
        SEEN.add((a.phase, kind, b.phase))
        evidence, step = analyse(self.policy, a, fold.window, event["time"]), self.policy.steps[min(a.step, len(self.policy.steps) - 1)]  # fmt: skip
        more = any(b.weights.get(v, 0) > a.weights.get(v, 0) + 1e-9 for v in self.policy.variants)
        if b.phase == "Degraded":
            assert b.aborted and b.weights == {"baseline": 100.0} and not b.mirror
        assert a.phase != "Degraded" or kind == "retry"
        assert a.phase != "Healthy" or (kind, b.phase) in (("undo", "Degraded"), ("displaced", "Paused"))
        if more and kind != "retry":
            assert kind in ("tick", "resume", "promote") and evidence.outcome != "fail"
            assert kind != "tick" or a.phase == "Progressing" or a.paused_by == "step"
        if b.phase == "Healthy" and a.phase != "Healthy":
            assert b.weights == {"canary": 100.0} and evidence.samples and not evidence.silent and a.stage_kind == "canary"  # fmt: skip
            assert kind != "tick" or evidence.outcome == "pass"
        if kind == "tick" and step.kind == "analysis" and b.step > a.step:
            assert evidence.samples >= step.min_samples and event["time"] - a.step_since >= step.min_duration
        if b.stage == a.stage and b.looks != a.looks:
            late = event["time"] - a.deadline_from >= step.max_duration
            assert b.looks == a.looks + 1 and evidence.samples >= (a.look_n + 1 if late else 2 * a.look_n)

    def teardown(self):
        "The registry is back, and the log, the aliases and the ledger say the same."
        if not hasattr(self, "c"):
            return
        self.registry.away = False
        for _ in range(2):
            self.now += 100
            self.restart()
            self.c.step()
        held, ledger = {"champion": "sha256:a"}, [("register", "champion", "sha256:a")]
        for (body,) in self.store.rows("select body from outbox order by seq, n"):
            e = json.loads(body)
            ledger += [(e["action"], e["alias"], e["release"])] if held.get(e["alias"]) != e["release"] else []
            held[e["alias"]] = e["release"]
        assert json.loads(self.registry.aliases.read_text()) == held and not self.store.promises("r")
        assert [(x.action, x.alias, x.after) for x in read_ledger(self.registry.ledger)] == ledger
        assert held["champion"] == ("sha256:canary" if self.c.state.phase == "Healthy" else "sha256:a")
        self.store.close()
        shutil.rmtree(self.folder)


def test_whatever_happens_the_rules_of_a_rollout_hold():
    how = settings(max_examples=12, stateful_step_count=20, deadline=None, database=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
    run_state_machine_as_test(Machine, settings=how)
    assert len(SEEN) >= 8, SEEN
