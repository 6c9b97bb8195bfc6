"""Properties of the text path, for any text that hypothesis can think of: preprocessing, tokens, template, postprocessing."""

import json
from unicodedata import category

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llmkit.core.errors import KitError
from llmkit.data.privacy import find_pii, mask, masked
from llmkit.data.records import UNSEEN, RowError, Shape, folded, normalise
from llmkit.data.split import place
from llmkit.evals.choice import needed_rows, option_ids
from llmkit.evals.language import windows
from llmkit.evals.overlap import common_subsequence, rouge_l, squad_normal, token_f1
from llmkit.evals.suite import item, predicted_label
from llmkit.model.tiny import train_tokenizer
from llmkit.model.tokenizer import Tokenizer, encode_example
from llmkit.runtime.text import Detokenizer, StopStrings

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
SAID = TEXT.filter(lambda t: not set(map(category, t)) <= {*UNSEEN})  # something is to be seen
WORDS = st.lists(st.sampled_from(["card", "The", "a", "5", "Straße", "lost,", "-", "déjà"]), max_size=8).map(" ".join)
settings.register_profile(
    "unit", deadline=None, max_examples=100, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unit")


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    "A byte-level tokenizer with the kit's own template."
    folder = tmp_path_factory.mktemp("tok")
    train_tokenizer(folder, [f"the card of customer {i} arrived on day {i % 9}" for i in range(200)], 400)
    return Tokenizer.load(folder)


# -- preprocessing ------------------------------------------------------------------------------------------------


def row(asked, said, **more):
    "A row as a source gives it."
    return {"prompt": asked, "completion": said, **more}


@given(SAID, SAID)
def test_normalising_twice_is_normalising_once(asked, said):
    once = normalise(row(asked, said))
    assert normalise(once) == once and json.loads(json.dumps(once)) == once
    assert [m["content"] for m in once["messages"]] == [asked, said]  # nothing is trimmed or rewritten


@given(st.text(" \t\n\u00a0", max_size=5), SAID)
def test_a_row_without_words_is_refused(nothing, said):
    for bad in (row(nothing, said), row(said, nothing)):
        with pytest.raises(RowError):
            normalise(bad)


@given(SAID, SAID)
def test_a_template_puts_the_text_in_as_it_is(asked, said):
    shape = Shape(columns={"completion": "b"}, templates={"prompt": "Q: {a}"})
    assert normalise({"a": asked, "b": said}, shape)["messages"][0]["content"] == f"Q: {asked}"


@given(TEXT)
def test_folding_is_stable_and_blind_to_case_and_space(text):
    assert folded(folded(text)) == folded(text)
    assert folded(f"  {text}\n") == folded(text)


MAIL = st.from_regex(r"[a-z]{1,8}@[a-z]{2,8}\.com", fullmatch=True)


@given(WORDS, MAIL, WORDS)
def test_masking_leaves_no_address_and_everything_else(before, mail, after):
    text = f"{before} {mail} {after}"
    assert masked(text) == text.replace(mail, "<EMAIL_ADDRESS>")
    assert masked(masked(text)) == masked(text)


@given(TEXT)
def test_findings_lie_in_the_text_in_order_and_apart(text):
    found = find_pii(text)
    assert all(0 <= f.start < f.end <= len(text) for f in found)
    assert all(a.end <= b.start for a, b in zip(found, found[1:], strict=False))
    assert (mask(text, found) == text) == (not found)


@given(st.text(max_size=20), st.integers(0, 9))
def test_a_name_is_always_in_the_same_split(name, seed):
    shares = {"train": 0.8, "validation": 0.1, "test": 0.1}
    assert place(name, shares, seed) == place(name, dict(reversed(shares.items())), seed)


# -- tokens -------------------------------------------------------------------------------------------------------


@given(TEXT)
def test_every_text_survives_the_round_trip(tok, text):
    assume(not any(c in text for c in tok.control))
    ids = tok.encode(text)
    assert tok.decode(ids) == text and all(0 <= i < tok.vocab_size for i in ids)


@given(TEXT)
def test_text_makes_no_special_token(tok, text):
    assume(not any(c in text for c in tok.control))
    special = {tok.backend.token_to_id(c) for c in tok.control} | set(tok.eos_ids) | {tok.pad_id}
    assert not special & set(tok.encode(text))


@given(SAID, st.data())
def test_control_tokens_that_somebody_types_steer_nothing(tok, text, data):
    at, control = data.draw(st.integers(0, len(text))), data.draw(st.sampled_from(sorted(tok.control)))
    typed = [{"role": "user", "content": text[:at] + control + text[at:]}]
    honest = [{"role": "user", "content": "x"}]
    steering = {tok.backend.token_to_id(c) for c in tok.control}
    try:
        ids = tok.chat(typed)
    except KitError as e:
        assert "cannot be written as text" in str(e)
        return
    assert sum(i in steering for i in ids) == sum(i in steering for i in tok.chat(honest))
    assert control in tok.decode(ids, skip_special=False)


@given(SAID, SAID)
def test_an_option_continues_its_prompt(tok, prompt, option):
    assume(not any(c in prompt + option for c in tok.control) and prompt.strip())
    before, after = option_ids(tok, prompt, option)
    whole = tok.encode(prompt + option)
    kept = len(before)
    assert after == whole[kept:]
    assert tok.decode(before) == prompt.rstrip()


# -- chat template ------------------------------------------------------------------------------------------------

CHAT = st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3)


@given(CHAT)
def test_the_prompt_is_the_beginning_of_the_example(tok, turns):
    assume(not any(c in x for t in turns for x in t for c in tok.control))
    messages = [m for a, b in turns for m in ({"role": "user", "content": a}, {"role": "assistant", "content": b})]
    ids, counted = encode_example(tok, messages)
    prompt = tok.chat(messages[:-1])
    assert ids[: len(prompt)] == prompt and counted == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    assert ids[-1] in tok.eos_ids and not set(ids[len(prompt) : -1]) & set(tok.eos_ids)
    assert messages[-1]["content"].strip() in tok.decode(ids[len(prompt) :])


@given(CHAT, st.integers(0, 2))
def test_two_conversations_never_read_the_same(tok, turns, which):
    messages = [m for a, b in turns for m in ({"role": "user", "content": a}, {"role": "assistant", "content": b})]
    i = min(which, len(messages) - 1)
    other = [*messages]
    other[i] = {**other[i], "content": other[i]["content"] + "!"}
    assert tok.render(messages) != tok.render(other)


# -- postprocessing -----------------------------------------------------------------------------------------------


@given(TEXT)
def test_streamed_text_is_the_text(tok, text):
    assume(not any(c in text for c in tok.control))
    d = Detokenizer(tok.decode)
    assert "".join([*(d.add(i) for i in tok.encode(text)), d.flush()]) == text


@settings(max_examples=400)
@given(
    st.text("ab|\n", max_size=30), st.lists(st.text("ab|\n", min_size=1, max_size=4), min_size=1, max_size=3), st.data()
)
def test_nothing_at_or_after_a_stop_string_gets_out(text, stops, data):
    s, out, rest = StopStrings(stops), "", text
    while rest and not s.hit:
        n = data.draw(st.integers(1, len(rest)))
        out, rest = out + s.add(rest[:n]), rest[n:]
    out += "" if s.hit else s.flush()
    first = [text.find(x) for x in stops if x in text]
    assert text.startswith(out) and not any(x in out for x in stops)
    assert s.hit == bool(first) and (s.hit or out == text)


@given(st.from_regex(r"[a-z][a-z_]{0,12}", fullmatch=True), st.text(max_size=30), st.sampled_from(":\n"))
def test_a_label_is_found_whatever_follows_it(label, rest, end):
    assert predicted_label(f"{label}{end}{rest}") == label
    assert predicted_label(f"  {label} {end} {rest}") == label


@given(TEXT)
def test_a_label_is_one_clean_line(text):
    found = predicted_label(text)
    assert found == found.strip() and ":" not in found and "\n" not in found


@given(SAID, SAID)
def test_an_item_keeps_question_and_answer_apart(asked, said):
    i = item({"id": 7, **normalise(row(asked, said))})
    assert (i.id, i.messages[-1]["content"], i.answer) == ("7", asked, said)


# -- scorers ------------------------------------------------------------------------------------------------------


@given(WORDS, WORDS)
def test_overlaps_are_shares_symmetric_and_whole_for_itself(a, b):
    for score in (rouge_l, token_f1):
        assert 0 <= score(a, b) <= 1 and score(a, b) == pytest.approx(score(b, a))
    assert token_f1(a, a) == 1.0
    assert squad_normal(squad_normal(a)) == squad_normal(a)


@given(WORDS, WORDS)
def test_rouge_l_against_rouge_score(a, b):
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    oracle = rouge_scorer.RougeScorer(["rougeL"]).score(a, b)["rougeL"].fmeasure
    assert rouge_l(b, a) == pytest.approx(oracle)


@given(WORDS, WORDS)
def test_token_f1_and_match_against_torchmetrics(a, b):
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    assume(squad_normal(a) and squad_normal(b))
    oracle = squad([{"prediction_text": a, "id": "1"}], [{"answers": {"answer_start": [0], "text": [b]}, "id": "1"}])
    assert token_f1(a, b) * 100 == pytest.approx(float(oracle["f1"]), abs=1e-3)
    assert (squad_normal(a) == squad_normal(b)) * 100 == float(oracle["exact_match"])


@given(st.lists(st.integers(0, 3), max_size=9), st.lists(st.integers(0, 3), max_size=9))
def test_a_common_subsequence_is_no_longer_than_either(a, b):
    n = common_subsequence(a, b)
    assert n <= min(len(a), len(b)) and n == common_subsequence(b, a) == common_subsequence(a[::-1], b[::-1])
    assert common_subsequence(a, a) == len(a)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=12))
def test_every_row_is_the_beginning_of_the_one_that_covers_it(rows):
    kept, where = needed_rows(rows)
    assert all(kept[w][: len(r)] == r for r, w in zip(rows, where, strict=True))
    assert all(k in rows for k in kept)
    assert not any(a != b and b[: len(a)] == a for a in kept for b in kept) and len({*map(tuple, kept)}) == len(kept)


@given(st.integers(1, 60), st.integers(1, 20))
def test_windows_score_every_token_once_with_as_much_before_it_as_fits(n, context):
    cut = windows(list(range(n)), -1, context)
    assert [t for _, c in cut for t in c] == list(range(n))
    for read, scored in cut:
        whole = [*read, *scored]
        assert len(whole) <= context + 1 and read and whole == list(range(whole[0], whole[-1] + 1))
        assert read[0] == -1 or len(whole) == context + 1
