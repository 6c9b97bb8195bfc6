"""A bundle is made from a pass alone, and no byte of it can change unseen."""

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from release_road import POLICY, run_gate, run_package, write_reports

from llmkit.core.artifact import open_artifact, seal
from llmkit.core.digests import canonical_json, digest_bytes
from llmkit.core.errors import KitError
from llmkit.core.files import read_json, write_json
from llmkit.deploy.image import image_write
from llmkit.release.bundle import faults, verify_bundle
from llmkit.release.registry import register_release, versions
from llmkit.release.release import Release, write_release
from llmkit.release.sign import beside, detached
from llmkit.release.signed import check_bundle, sign_bundle

BUNDLE = "artifacts/package/bundle"


def test_bundle_of_a_passing_engine_is_whole_and_made_twice_the_same(packaged):
    first = verify_bundle(BUNDLE)
    assert run_package().digest == first.digest
    assert {"engine", "verdict", "evaluate", "quantize"} == set(first.parents)
    body = read_json(first / "bundle.json")
    assert body["engine"]["digest"] == open_artifact("artifacts/quantize/engine").digest
    assert body["engine"]["precision"] == "int8" and body["engine"]["context_length"] == 128
    assert len(body["self_test"]["prompts"]) == 3 and body["system"] == "You sort questions."
    assert all(p["tokens"] and p["messages"][0]["role"] == "system" for p in body["self_test"]["prompts"])
    assert "llmkit ask ." in (first / "README.md").read_text()


@pytest.mark.parametrize(
    "outcome, rule",
    [
        ("fail", {"metric": "accuracy", "min": 0.99}),
        ("inconclusive", {"metric": "accuracy", "min": 0.91, "bound": "wilson"}),
        ("fail", {"metric": "never_measured", "min": 0.5}),
    ],
)
def test_anything_but_a_pass_makes_no_bundle(project, outcome, rule):
    assert run_gate({"rules": [*POLICY["rules"], rule]}).meta["outcome"] == outcome
    with pytest.raises(KitError, match="only a pass is packaged"):
        run_package()
    assert not (project / BUNDLE).exists()


def test_a_verdict_on_reports_that_were_measured_again_is_refused(project):
    run_gate()
    parts = {r: open_artifact(p) for r, p in _parts().items()}
    write_reports(parts, "artifacts/evaluate/report", "artifacts/quantize/report", accuracy=0.5)
    with pytest.raises(KitError, match="judged another report"):
        run_package()


def test_an_engine_that_was_built_again_is_refused(project):
    run_gate()
    from llmkit.model.quantize import quantize

    with quantize("artifacts/merge/model", "artifacts/quantize/engine", precision="fp32"):
        pass
    with pytest.raises(KitError, match="judged another engine"):
        run_package()


def test_an_edited_outcome_is_refused(project):
    run_gate({"rules": [{"metric": "accuracy", "min": 0.99}]})
    path = project / "artifacts/gate/verdict/verdict.json"
    write_json(path, read_json(path) | {"outcome": "pass"})
    with pytest.raises(KitError, match="changed since it was made"):
        run_package()


def test_the_baseline_that_the_verdict_compared_with_goes_along(project):
    shutil.copytree("artifacts/evaluate/report/engine", "baseline/engine")
    compare = {"metric": "accuracy", "noninferiority": 0.05, "against": "baseline"}
    assert run_gate({"rules": [compare]}).meta["outcome"] == "pass"
    bundle = run_package()
    assert "reports/baseline/report.json" in bundle.files
    assert faults(bundle.path) == []
    shutil.rmtree("baseline")
    with pytest.raises(KitError, match="baseline: judged another report"):
        run_package()


def test_a_failure_on_the_way_leaves_the_old_bundle_and_no_litter(packaged, monkeypatch):
    before = verify_bundle(BUNDLE).digest
    monkeypatch.setattr("llmkit.release.bundle.readme", lambda body: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_package()
    assert verify_bundle(BUNDLE).digest == before
    assert sorted(p.name for p in (packaged / "artifacts/package").iterdir()) == ["bundle", "record.ipynb"]


def test_every_file_is_guarded_against_a_flipped_a_lost_and_an_extra_byte(packaged, capsys):
    shutil.copytree(BUNDLE, "copy")
    rng = random.Random(0)
    for path in sorted(p for p in (packaged / "copy").rglob("*") if p.is_file()):
        whole, name = path.read_bytes(), path.name
        at = rng.randrange(len(whole))
        for changed in (
            whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :],
            whole[:-1],
            whole + b"\n",
        ):
            path.write_bytes(changed)
            found = faults("copy")
            assert found and name in " ".join(found), (path, found)
        path.unlink()
        assert path.stem in " ".join(faults("copy")), path
        path.write_bytes(whole)
    assert faults("copy") == []
    (packaged / "copy/engine/.hidden").write_text("x")
    assert check_bundle("copy") == 1
    assert "engine/.hidden is extra" in capsys.readouterr().out


def test_another_bundle_is_seen_by_its_digest_alone(packaged):
    assert check_bundle(BUNDLE, digest="sha256:" + "0" * 64) == 1
    assert check_bundle(BUNDLE, digest=verify_bundle(BUNDLE).digest) == 0
    for what, why in {"nowhere": "no artifact here", "artifacts/quantize/engine": "is a engine, not a bundle"}.items():
        with pytest.raises(KitError, match=why):  # nothing was checked: wrong usage
            check_bundle(what)


def test_no_licence_no_bundle(project):
    run_gate()
    (project / "LICENSE").unlink()
    with pytest.raises(KitError, match="no licence file"):
        run_package()


def _parts():
    return {
        "base": "artifacts/base/base",
        "dataset": "artifacts/prepare/dataset",
        "model": "artifacts/merge/model",
        "engine": "artifacts/quantize/engine",
    }


def test_what_no_manifest_can_name_is_found_in_every_artifact_and_sealed_in_none(packaged, tmp_path):
    import os

    from llmkit.core.artifact import damage, seal

    art = open_artifact("artifacts/merge/model")
    (tmp_path / "far").mkdir()
    for i in range(20):
        (tmp_path / f"far/{i}").write_text("x")
    (art / "linked").symlink_to(tmp_path / "far")
    (art / "gone").symlink_to("nothing")
    os.mkfifo(art / "pipe")
    assert damage(art) == [f"{n} is extra: no file, and no folder" for n in ("gone", "linked", "pipe")]
    with pytest.raises(KitError, match="no manifest can name this"):
        seal(art.path, "model")
    for i in range(20):
        (art / f"more-{i}").write_text("x")
    with pytest.raises(KitError, match="and 14 more"):
        open_artifact(art.path)


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="no ssh-keygen: apt-get install openssh-client")
def test_a_signature_goes_into_the_registry_and_an_image(packaged, capsys):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "ann"], check=True)
    digest = verify_bundle(BUNDLE).digest
    assert check_bundle(BUNDLE) == 0 and "not signed" in capsys.readouterr().out
    write_release(Release("signed", digest, "sha256:v", "sha256:c"), "released")
    uri, how = "sqlite:///signed.db", {"out": "receipt.json", "settings": "signed.ini"}
    Path("signed.ini").write_text(f"[DEFAULT]\ntracking_uri = {uri}\nledger = signed.jsonl\nsigning_key = ann\n")
    assert register_release("released", **how) == 0 and "; bundle not signed" in capsys.readouterr().out
    assert sign_bundle(BUNDLE, settings="signed.ini") == 0 and verify_bundle(BUNDLE).digest == digest
    before = Path("signed.jsonl").read_bytes()
    assert register_release("released", **how) == 0 and "; bundle signed with key SHA256:" in capsys.readouterr().out
    (v,) = versions(uri, "signed")
    assert v.tags["signature"] == beside(BUNDLE).read_text() and Path("signed.jsonl").read_bytes() == before
    assert image_write(BUNDLE, "image") == 0 and "; bundle signed with key" in capsys.readouterr().out
    Path("signers").write_text("ann " + Path("ann.pub").read_text())
    assert "COPY --chmod=644 bundle.sig /bundle.sig" in Path("image/Containerfile").read_text()
    assert check_bundle("image/bundle", signers="signers", digest=digest) == 0
    beside(BUNDLE).write_text(beside(BUNDLE).read_text().replace("U1N", "U1M", 1))
    assert register_release("released", **how) == 0
    assert "; bundle not signed: bundle.sig is left where it is" in capsys.readouterr().out
    beside(BUNDLE).unlink()


@pytest.mark.parametrize("signers", ["", "signers"])
@pytest.mark.parametrize(
    "put, said",
    [
        (lambda p: p.write_bytes(b"\xf6"), "is not UTF-8: byte 0xf6 at 0"),
        (lambda p: p.mkdir(), "cannot read: Is a directory"),
        (lambda p: p.symlink_to("nothing"), "no such file"),
    ],
)
def test_what_lies_in_the_place_of_a_signature_and_is_none_lets_no_bundle_pass(packaged, capsys, signers, put, said):
    Path("signers").touch()
    put(beside(BUNDLE))
    assert check_bundle(BUNDLE, signers=signers) == 1
    fix = "Let this user read it, sign the bundle again, or remove it"
    assert capsys.readouterr().out.splitlines()[-1] == f"bundle.sig: is no signature: {said}. {fix}"
    assert detached(BUNDLE)[0] == "" and "bundle.sig is left where it is" in detached(BUNDLE)[1]


def test_a_bundle_sealed_anew_around_what_is_not_so_is_not_whole(packaged, capsys):
    art, about = verify_bundle(BUNDLE), Path(BUNDLE, "bundle.json")
    body, whole = read_json(about), about.read_bytes()
    engine, verdict = body["engine"], body["verdict"]
    up = {n: r | {"folder": "../bundle/" + r["folder"]} for n, r in body["reports"].items()}
    lies = {
        "": "not valid JSON",
        "[1]": r"must be an object with named values (got [1])",
        **{json.dumps({k: v for k, v in body.items() if k != gone}): f"{gone}: " for gone in ("schema", "name", "engine", "tokenizer", "reports", "verdict", "self_test")},
        json.dumps(body | {"schema": "llmkit.bundle/9"}): "schema: is not what the bundle holds (got 'llmkit.bundle/9')",
        json.dumps(body | {"name": 5}): "name: must be a str, not a int (got 5)",
        json.dumps(body | {"engine": 5}): "engine: is not what the bundle holds (got 5)",
        json.dumps(body | {"engine": engine | {"digest": "sha256:0"}}): "engine.digest: is not what the bundle holds (got 'sha256:0')",
        json.dumps(body | {"verdict": verdict | {"digest": "sha256:0"}}): "verdict.digest: is not what the bundle holds (got 'sha256:0')",
        json.dumps(body | {"verdict": verdict | {"outcome": "fail"}}): "verdict.outcome: is not what the bundle holds (got 'fail')",
        json.dumps(body | {"reports": up}): ".folder: is not what the bundle holds (got '../bundle/reports/",
        json.dumps(body | {"self_test": {"max_tokens": 8, "prompts": [1]}}): "self_test.prompts[0]: must be a dict, not a int (got 1)",
    }  # fmt: skip
    for text, said in lies.items():
        about.unlink()  # it may be linked
        about.write_text(text)
        seal(BUNDLE, "bundle", art.parents, art.recipe)
        assert check_bundle(BUNDLE) == 1, text
        found, fix = capsys.readouterr().out.splitlines()
        assert found.startswith(f"{about}: ") and said in found
        assert fix == f"{BUNDLE}: not whole. Make it again with `dvc repro package`, or copy it again"
    about.write_bytes(whole)
    for parents, said in (
        (art.parents | {"engine": 5}, "parents.engine: is no digest (got 5). Make it again"),
        (art.parents | {"../../../quantize/engine": engine["digest"]}, "parents.../../../quantize/engine: is no part of the bundle"),
    ):  # fmt: skip
        seal(BUNDLE, "bundle", parents, art.recipe)
        assert said in faults(BUNDLE)[0]
    sealed = {"kind": "bundle", "files": art.files, "parents": art.parents, "recipe": {"x": "DEEP"}}
    for deep in (400, 900, 980):
        digest = digest_bytes(canonical_json(sealed).replace('"DEEP"', "[" * deep + "]" * deep).encode())
        manifest = canonical_json({"schema": "llmkit.artifact/1", **sealed, "meta": {}, "digest": digest})
        (art / "manifest.json").write_text(manifest.replace('"DEEP"', "[" * deep + "]" * deep))
        (found,) = faults(BUNDLE)
        assert "manifest.json" in found or "nested too deep" in found
    seal(BUNDLE, "bundle", art.parents, art.recipe)
    assert faults(BUNDLE, art.digest) == []
    about.write_text(json.dumps({k: v for k, v in body.items() if k != "system"}))  # as an older version wrote it
    seal(BUNDLE, "bundle", art.parents, art.recipe)
    assert faults(BUNDLE) == []
