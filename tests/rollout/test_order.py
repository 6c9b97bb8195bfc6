"The orders of the rollout workflow, as its runner gives them: to the service's own databases, with a name and a reason."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rollout_road import CANARY
from ruamel.yaml import YAML

from llmkit.release.ledger import actor, read_ledger
from llmkit.release.registry import register
from llmkit.release.release import Release
from llmkit.rollout.store import Store

SCRIPT = Path(__file__).parents[2] / "tools/rollout_order.sh"


@pytest.fixture
def order(tmp_path):
    "A service's registry with two releases, and a checkout elsewhere that gives an order: its exit code, what it printed, the summary."
    service, checkout = tmp_path / "service", tmp_path / "checkout"
    service.mkdir(), checkout.mkdir()
    (checkout / "settings.ini").write_text("[DEFAULT]\ntracking_uri = sqlite:///mlflow.db\n[production]\n")
    YAML().dump({"rollout": CANARY}, checkout / "params.yaml")
    where = {"LLMKIT_TRACKING_URI": f"sqlite:///{service}/mlflow.db", "LLMKIT_ROLLOUTS": f"{service}/rollouts.db"}
    where |= {"LLMKIT_LEDGER": f"{service}/ledger.jsonl", "LLMKIT_ACTOR": "ann", "LLMKIT_PROFILE": "production"}
    for n in (1, 2):
        release = Release("bank-support", *(f"sha256:{x}{n}" for x in ("bundle", "verdict", "card")))
        alias = "champion" if n == 1 else "challenger"
        register(
            release, where["LLMKIT_TRACKING_URI"], f"file:///bundle{n}", alias=alias, ledger=where["LLMKIT_LEDGER"]
        )

    def give(order, because="", model="bank-support", **without):
        env = {**os.environ, **where, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **without}
        env |= {"ORDER": order, "MODEL": model, "BECAUSE": because, "GITHUB_STEP_SUMMARY": str(tmp_path / "summary")}
        p = subprocess.run(["bash", SCRIPT], cwd=checkout, env=env, capture_output=True, text=True)
        summary = tmp_path / "summary"
        return p.returncode, p.stdout + p.stderr, summary.read_text() if summary.exists() else ""

    give.service, give.checkout = service, checkout
    return give


def test_an_order_reaches_the_service_and_says_who_and_why(order):
    code, said, summary = order("start", "more $(intents) `now`")
    assert code == 0 and "bank-support-2: Progressing" in said, said
    assert "### rollout start, by ann" in summary and summary.endswith("exit code 0\n")
    assert order("pause", "lunch")[0] == 0 and order("status")[0] == 3
    code, said, _ = order("abort", "--drift")
    assert code == 0 and "ann: --drift" in said and order("status")[0] == 1
    kept = Store(order.service / "rollouts.db").rows("select body from events order by seq")
    given = [e for e in (json.loads(row[0]) for row in kept) if e.get("who")]
    assert [(e["kind"], e["who"], e["because"]) for e in given] == [
        ("start", "ann", "more $(intents) `now`"), ("pause", "ann", "lunch"), ("abort", "ann", "--drift"),
    ]  # fmt: skip
    assert {p.name for p in order.service.iterdir()} >= {"mlflow.db", "rollouts.db", "ledger.jsonl"}
    assert {p.name for p in order.checkout.iterdir()} == {"params.yaml", "settings.ini"}  # nothing was begun here


def test_an_approval_is_given_in_the_name_of_who_orders_it(order):
    rules = {"rollout": CANARY | {"approvals": {"required": 1, "distinct_from_author": True, "expires": "14d"}}}
    YAML().dump(rules, order.checkout / "params.yaml")
    code, said, _ = order("start", "more intents", LLMKIT_ACTOR="bob")
    assert code == 1 and "0 of 1 approvals" in said
    code, said, _ = order("approve", "read the card", LLMKIT_ACTOR=actor())
    assert code == 2 and "does not approve" in said  # who registered it
    code, said, summary = order("approve", "read the card")
    assert code == 0 and "1 of 1 approvals: ann" in said and "approve, by ann" in summary, said
    last = read_ledger(order.service / "ledger.jsonl")[-1]
    assert (last.action, last.who, last.terms.why) == ("approve", "ann", "read the card")
    assert order("start", "more intents")[0] == 0


def test_a_refused_order_fails_the_job_and_its_summary_says_why(order):
    code, said, summary = order("promote", "now")
    assert code == 2 and "no rollout was begun" in said and "no rollout was begun" in summary


@pytest.mark.parametrize("key", ["LLMKIT_TRACKING_URI", "LLMKIT_ROLLOUTS", "LLMKIT_LEDGER", "LLMKIT_ACTOR"])
def test_without_an_address_no_new_service_is_begun(order, key):
    code, said, summary = order("start", "why not", **{key: ""})
    assert code == 2 and f"{key} is not set" in said and summary == ""
    assert len(read_ledger(order.service / "ledger.jsonl")) == 2


@pytest.mark.parametrize("because", ["", "  "])
def test_an_order_needs_a_reason(order, because):
    code, said, _ = order("start", because)
    assert code == 2 and "needs a reason" in said
