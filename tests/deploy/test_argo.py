"The exported objects against Argo's own schemas, and their only metric against a real judge."

import re
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from llmkit.deploy.argo import argo_objects, export_argo
from llmkit.rollout.policy import read_rollout

sys.path.insert(0, str(Path(__file__).parents[1] / "rollout"))
ROOT = Path(__file__).parents[2]


def closed(schema):
    "A schema in which nothing is allowed that it does not name, as the API server prunes it."
    if isinstance(schema, list):
        return [closed(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    out = {k: closed(v) for k, v in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out.setdefault("additionalProperties", False)
    return out


@pytest.fixture(scope="module")
def crds(shared):
    found = {}
    for path in shared("schemas", "argo-rollouts").glob("*-crd.yaml"):
        crd = YAML(typ="safe").load(path.read_text())["spec"]
        found[crd["names"]["kind"]] = closed(crd["versions"][0]["schema"]["openAPIV3Schema"])
    for kind in found.values():
        kind["properties"]["metadata"] = {"type": "object"}  # of Kubernetes, not of Argo
    return found


@pytest.mark.parametrize("ingress", ["", "bank"])
def test_the_policy_of_the_project_is_valid_for_argo(crds, tmp_path, ingress):
    from jsonschema import Draft202012Validator

    out = tmp_path / "argo.yaml"
    assert (
        export_argo(
            str(out),
            workload="bank-server",
            rollout="r1",
            ingress=ingress,
            replicas=10,
            params=str(ROOT / "params.yaml"),
        )
        == 0
    )
    objects = list(YAML(typ="safe").load_all(out.read_text()))
    for o in objects:
        assert [e.message for e in Draft202012Validator(crds[o["kind"]]).iter_errors(o)] == []
    rollout, *templates = objects
    asked = re.findall(r"templateName: (\S+)", out.read_text())
    assert sorted(asked) == sorted(t["metadata"]["name"] for t in templates), "each template is used, each use has one"
    assert rollout["spec"]["rollbackWindow"] == {"revisions": 1}
    for t in templates:  # what Argo would take by default is said
        (metric,) = t["spec"]["metrics"]
        assert metric.keys() >= {"failureLimit", "inconclusiveLimit", "consecutiveErrorLimit", "interval"}
        assert metric["consecutiveErrorLimit"] > 100_000, "the policy pauses where the judge is away"
        assert [m["metricName"] for m in t["spec"]["measurementRetention"]] == [metric["name"]]
    weights = [s["setWeight"] for s in rollout["spec"]["strategy"]["canary"]["steps"] if "setWeight" in s]
    section = YAML(typ="safe").load((ROOT / "params.yaml").read_text())["rollout"]
    assert weights == [s["setWeight"] for s in section["steps"] if "setWeight" in s]
    # a key that Argo does not know would be found
    templates[0]["spec"]["metrics"][0]["sucessCondition"] = "true"
    assert list(Draft202012Validator(crds["AnalysisTemplate"]).iter_errors(templates[0]))


def measure(http, template, rollout):
    "One measurement, as Argo takes it: the URL with its arguments, the JSON path, the two conditions."
    (metric,) = template["spec"]["metrics"]
    web = metric["provider"]["web"]
    reply = http.get(web["url"].replace("{{args.rollout}}", rollout).removeprefix("http://judge:8081"))
    assert reply.status_code == 200
    value = reply.json()[re.fullmatch(r"\{\$\.(\w+)\}", web["jsonPath"])[1]]
    holds = lambda c: bool(c) and eval(c.replace("||", " or ").replace("!(", "not ("), {"result": value})
    if holds(metric.get("failureCondition")):
        return "Failed"
    return "Successful" if holds(metric["successCondition"]) else "Inconclusive"


@pytest.mark.parametrize("how, step, harm", [(None, "Inconclusive", "Successful"), ({"errors": (0.01, 0.5)}, "Failed", "Failed"), ({}, "Successful", "Successful")], ids=str)  # fmt: skip
def test_argo_learns_from_the_judge_what_to_do(tmp_path, how, step, harm):
    from fastapi.testclient import TestClient
    from rollout_road import CANARY, World

    from llmkit.rollout.judge_server import judge_app

    w = World(tmp_path, CANARY)
    objects = argo_objects(
        read_rollout(CANARY), name="b", workload="s", judge="http://judge:8081", rollout="r1", ingress="b"
    )
    first = next(o for o in objects if o["metadata"]["name"].startswith("b-step-"))
    background = next(o for o in objects if o["metadata"]["name"] == "b-harm")
    http = TestClient(judge_app(World(tmp_path, CANARY, begin=False).store, lambda: w.now))
    seen = []
    for _ in range(40 if how is not None else 1):
        if how is not None:
            w.traffic(1000, **how)  # the log grows; nobody but Argo moves the traffic
        seen.append((measure(http, first, "r1"), measure(http, background, "r1")))
        if seen[-1][0] != "Inconclusive":
            break
    assert seen[-1] == (step, harm), seen
