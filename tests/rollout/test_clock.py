"""The clock of a machine jumps: no minimum duration ends early, no deadline passes, and no month of traffic is deleted."""

import pytest
from rollout_road import CANARY, H, World

from llmkit.rollout.controller import Controller
from llmkit.serve.events import Events
from llmkit.serve.samples import Texts

DAY, MONTH = 24 * H, 31 * 24 * H


class Watched(World):
    "A rollout with a server that looks all the time."

    def __init__(self, folder, section=CANARY):
        super().__init__(folder, section)
        self.seen, self.c = 0.0, self.again()

    def again(self):
        "Another server of the same log, or this one after a restart."
        return Controller(self.store, "r1", self.registry, lambda: self.now, attends=True)

    def serve(self, seconds, *others):
        "A request a second, a step every 25; whether the rollout goes on."
        for i in range(int(seconds)):
            self.request(every=1.0)
            self.seen += 1
            if i % 25 == 24 and [c.step() for c in (self.c, *others)][0].finished:
                return False
        return True


@pytest.mark.parametrize("restart", [False, True])
def test_a_clock_that_jumps_ahead_ends_no_minimum_duration(tmp_path, restart):
    w = Watched(tmp_path)
    w.serve(1500)
    w.now += MONTH
    if restart:
        w.c = w.again()
    others = [w.again(), w.again()]  # of several servers each notices, and one writes it down
    w.serve(1500, *others)
    assert w.c.state.stage == 1 and [k for _, k, _ in w.store.history("r1")] == ["start", "gap"]
    assert not w.serve(6000, *others)
    assert w.c.state.phase == "Healthy" and 2 * H <= w.seen < 2 * H + 150
    assert w.store.replay("r1").state == w.c.state == others[0].step()


def test_a_clock_that_jumps_ahead_passes_no_deadline_and_ends_no_pause(tmp_path):
    w = Watched(
        tmp_path, CANARY | {"steps": [*CANARY["steps"][:1], {"pause": {"duration": "1h"}}, *CANARY["steps"][2:]]}
    )
    w.serve(600)
    w.now += MONTH
    w.serve(600)
    assert (w.c.state.phase, w.c.state.step) == ("Paused", 1)
    w.serve(3000)
    assert (w.c.state.phase, w.c.state.step) == ("Progressing", 3)
    w.now += MONTH
    w.serve(75)
    assert (w.c.state.phase, w.c.state.step) == ("Progressing", 3)  # max_duration is a day


def test_after_a_clock_is_set_back_the_step_is_measured_anew(tmp_path):
    w = Watched(tmp_path)
    w.serve(1500)
    w.now -= MONTH
    w.serve(3000)
    assert (w.c.state.stage, w.c.state.phase) == (2, "Progressing")
    w.now += MONTH  # and right again
    w.serve(1200)
    assert w.c.state.weights["canary"] == 50.0 and w.seen >= 1500 + H
    w.serve(7200)
    assert w.c.state.phase == "Healthy" and w.store.replay("r1").state == w.c.state


def test_a_step_that_begins_while_nobody_looks_waits_its_time_from_the_first_look_on(tmp_path):
    w = Watched(tmp_path)
    w.now += 2 * H
    assert w.c.step().step_since == 2 * H and w.c.state.stage == 1
    w.now += MONTH
    w.c.step()
    w.c.command("abort", "ann")
    w.now -= MONTH
    Controller(w.store, "r1", w.registry, lambda: w.now).command("retry", "ann")  # nobody ran after it was set back
    w.now += 300
    assert w.c.step().step_since == 2 * H and [k for _, k, _ in w.store.history("r1")][-1] == "retry"


def test_a_clock_that_jumps_ahead_deletes_no_month_of_a_rollout(tmp_path):
    w = World(tmp_path)
    batches = lambda: w.store.rows("select count(*) from events where kind = 'traffic'")[0][0]
    for _ in range(29):
        w.now += DAY
        w.request()
        w.c.step()
        w.store.expire(w.now - 30 * DAY, w.now)
    w.store.snapshot("r1", w.c.fold)
    before = batches()
    w.now += MONTH
    for _ in range(24):
        w.store.expire(w.now - 30 * DAY, w.now)
        w.now += H
    assert batches() >= before - 1 and w.store.replay("r1").state == w.c.state
    w.store.expire(w.now - 30 * DAY, w.now)
    assert batches() == 1  # that which no snapshot covers


@pytest.mark.parametrize("what", ["events", "texts"])
def test_a_clock_that_jumps_ahead_deletes_no_month_of_a_server(tmp_path, what, caplog):
    now = [0.0]
    log = {"events": Events, "texts": Texts}[what](tmp_path / "x.db", lambda: now[0])
    said = {"kind": "feedback", "rating": 1, "success": None, "label": None}
    put = lambda: (
        log.append({**said, "time": now[0], "id": str(now[0])}) if what == "events" else log.put(str(now[0]), "")
    )
    left = lambda: log.store.read(f"SELECT count(*) AS n FROM {what}")[0]["n"]
    for _ in range(40):
        now[0] += DAY
        put()
        log.expire(30 * DAY)
    assert left() == 31
    now[0] += MONTH
    for _ in range(24):
        put()
        log.expire(30 * DAY)
        now[0] += H
    assert left() >= 31 + 24 - 1 and "it was set, or nobody was here" in caplog.text
    now[0] -= MONTH  # it is set right in time, and nothing is missing
    log.expire(30 * DAY)
    assert left() >= 31 + 24 - 2
