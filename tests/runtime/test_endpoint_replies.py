"Replies outside the norm: each is refused by the address that gave it, and what is merely missing does no harm."

import httpx
import pytest

from llmkit.core.errors import KitError
from llmkit.core.report import read_report, write_report
from llmkit.evals.evaluate import evaluate
from llmkit.evals.suite import make_suite
from llmkit.runtime.endpoint import EndpointEngine


def asked(reply):
    "An endpoint that always replies this, by a transport in place of a server."

    def answer(request):
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        return httpx.Response(200, json=reply) if request.url.path.endswith("completions") else httpx.Response(404)

    return EndpointEngine("http://x/v1", transport=httpx.MockTransport(answer))


def suite(*scorers):
    "Two questions."
    rows = [
        {"id": str(i), "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"{q}: yes"}]}
        for i, q in enumerate(("balance", "card"))
    ]
    return make_suite("bank", 1, rows, scorers=scorers)


@pytest.mark.parametrize(
    "reply, said",
    [
        ({"choices": []}, "replied without choices"),
        ({"error": {"message": "out of memory"}}, "replied without choices: out of memory"),
        (["odd"], "replied without choices"),
        ({"choices": [{"index": 0}]}, "replied without message"),
        ({"choices": [{"message": None}]}, "replied without message"),
    ],
)
def test_a_reply_that_is_no_answer_is_refused_by_its_address(reply, said):
    engine = asked(reply)
    with pytest.raises(KitError, match=f"http://x/v1/chat/completions: {said}.*server's log"):
        engine.generate([engine.tokenizer.chat([{"role": "user", "content": "hm"}])])


def test_without_log_probabilities_answers_are_right_or_wrong_all_the_same(tmp_path):
    engine = asked({"choices": [{"message": {"content": "balance: yes"}, "finish_reason": "stop"}]})
    report = evaluate(engine, suite("label", "exact"))
    write_report(report, tmp_path)
    assert read_report(tmp_path).get("accuracy").value == 0.5
    with pytest.raises(
        KitError, match="m at http://x/v1: answers came without log-probabilities.*leave out calibration"
    ):
        evaluate(engine, suite("label", "calibration"))
