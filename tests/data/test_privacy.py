"""Secrets: what detect-secrets finds is found, wherever it stands, in time with the length of the text."""

import json
import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.privacy import LATER, RUNS, SPACES, find_pii, find_secrets, iban, luhn, mask, masked, secret_patterns

SIZE = 400_000
HOSTILE = (
    "://", "eyJ", "//", "sk-", "://a:", "eyJa.", "//a/:_authToken=", "//a/:_authToken=npm", "sk-T3BlbkFJ", "aws key '", "xoxb-1-",
    "glagent-", '":"', "key  =", "-1", "a", "A", "1", "[", " ", "\n", "hooks", "https://a:", "github_pat_", "pypi-AgEIcHlwaS5vcmc",
    "-----BEGIN PRIVATE " + "KEY-----\nMIIEpAIBAAKCAQEA\n", "-----BEGIN PRIVATE " + "KEY-----" + "\\n" * 40, "-", "END ", "BEGIN ", "END A PRIVATE ", "BEGIN " + "A " * 20,
    "authorization: bearer ", "npm_", "hvs.", 'password: "', "api_key='", "key: ", 'secret\\": \\"',
    "PuTTY-User-Key-File-3: ssh-rsa\nEncryption: ", "BEGIN PRIVATE " + "KEY" + " \n" * 500,
)  # fmt: skip


def denied():
    "The patterns of detect-secrets as they come, by name: the oracle."
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class as classes
    from detect_secrets.plugins.base import RegexBasedDetector

    chosen = [c for n, c in sorted(classes().items()) if issubclass(c, RegexBasedDetector) and "IP" not in n]
    return [(c.secret_type, p) for c in chosen for p in c().denylist]


PAIRS = list(zip(denied(), secret_patterns()[1:], strict=False))  # the first is that of a whole private key


def mended():
    "Pairs of a pattern and its linear form, where the two differ."
    return [(p, q, check) for (_, p), (_, q, check) in PAIRS if p.pattern != q.pattern]


def test_what_is_mended_is_in_the_installed_patterns():
    assert [n for (n, _), (m, _, _) in PAIRS if n != m] == [] and len(secret_patterns()) == 1 + len(PAIRS) + len(LATER)
    texts = [p.pattern for _, p in denied()]
    assert all(sum(t.startswith(start) for t in texts) == 1 for start in RUNS)
    assert sum(SPACES[0] in t for t in texts) == 5 and len(mended()) == 8


WORDS = [
    "eyJ", "a", "b-", "=", ".", "..", " ", "  ", "\n", "!", "//", "/", ":", "://", "/:_authToken=", "npm_", "npm_x", "0a" * 18, "sk-", "T3BlbkFJ",
    "aB3" * 7, "c" * 20, "cl", "cloudant", "_key", "key", "token", ":=", "=>", "::", '"', "]", "0f" * 32, "z" * 24, "z9" * 32, "sl", "softlayer",
    "ibm", "iam", "secret_access_key", "a1" * 24, "A_" * 22,
]  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=14).map("".join))
def test_the_linear_forms_find_what_the_patterns_find(text):
    for p, q, check in mended():
        found = [m.span() for m in q.finditer(text) if check is None or check(m[0])]
        assert found == [m.span() for m in p.finditer(text)], p.pattern


@pytest.mark.parametrize("unit", HOSTILE)
def test_a_hostile_row_takes_seconds(unit):
    text = "https://example.org/a-long-word key" + unit * (SIZE // len(unit)) + "{ password ="
    began = time.process_time()
    find_secrets(text)
    assert time.process_time() - began < 6


def jwt(size):
    "A JSON Web Token of some characters."
    letters = random.Random(size).choices("abcdefghijklmnopqrstuvwxyzABCDEF0123456789-_", k=size)
    return "eyJ" + "".join(letters[3 : size // 2]) + "." + "".join(letters[size // 2 + 1 :])


SECRETS = {
    "JSON Web Token": jwt(4000),
    "NPM tokens": "//registry.example.org/:_authToken=" + "npm_" + "x" * 36,
    "OpenAI Token": "sk-" + "a" * 20 + "T3BlbkFJ" + "b" * 20,
    "AWS Access Key": "AKIA" + "IOSFODNN7EXAMPLE",
    "Private Key": "BEGIN RSA " + "PRIVATE KEY",
    "Basic Auth Credentials": "://me:" + "hunter2@",
    "Hugging Face token": "hf_" + "a" * 34,
    "Cloudant Credentials": "cloudant_key" + " " * 3000 + "0f" * 32,
}


@pytest.mark.parametrize("entity", SECRETS)
@pytest.mark.parametrize("before", ["", "eyJ" * 30_000 + " ", "word " * 2000, "sk- " * 3000])
def test_a_secret_is_found_once_wherever_it_stands(entity, before):
    said = SECRETS[entity]
    for at in (0, 1, 4095, 8191):
        text = f"{before}{'.' * at} {said} and more"
        (found,) = [f for f in find_secrets(text) if f.entity == entity]
        assert said.startswith(text[found.start : found.end].strip()[:40]) and found.start >= len(before) + at
        assert re.search(re.escape(said), mask(text, [found])) is None


KEY = "PRIVATE " + "KEY"  # in two words, so that no scanner takes this file for a leak


def keys():
    "Private keys as OpenSSL, OpenSSH, PGP and PuTTY write them."
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    form, none, lock = s.PrivateFormat, s.NoEncryption(), s.BestAvailableEncryption(b"word")
    for key in (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256R1())):
        for how in (
            (form.PKCS8, none),
            (form.PKCS8, lock),
            (form.TraditionalOpenSSL, none),
            (form.TraditionalOpenSSL, lock),
            (form.OpenSSH, none),
        ):
            yield key.private_bytes(s.Encoding.PEM, *how).decode().strip()
    body = "\n".join(key.private_bytes(s.Encoding.PEM, form.PKCS8, none).decode().splitlines()[1:-1])
    yield f"-----BEGIN PGP {KEY} BLOCK-----\nVersion: GnuPG v2\nComment: of a test\n\n{body}\n=aB3+\n-----END PGP {KEY} BLOCK-----"


WRITTEN = {  # how a text holds a key
    "lines": lambda k: k,
    "dos": lambda k: k.replace("\n", "\r\n"),
    "json": lambda k: json.dumps(k)[1:-1],
    "json in json": lambda k: json.dumps(json.dumps(k))[3:-3],
    "yaml": lambda k: k.replace("\n", "\n    "),
    "quoted": lambda k: k.replace("\n", "\n> "),
    "source": lambda k: k.replace("\n", '\\n"\n  "'),
    "one line": lambda k: k.replace("\n", " "),
}


@pytest.mark.parametrize("form", WRITTEN)
def test_a_private_key_goes_whole(form):
    for key in keys():
        said = WRITTEN[form](key)
        for before, after in (("", ""), ("my key: ", "\nThank you"), ('{"key": "', '", "user": "jo"}')):
            assert masked(f"{before}{said}{after}") == f"{before}<PRIVATE_KEY>{after}", key.splitlines()[0]
        assert masked(f"{said}\nand\n{said} end") == "<PRIVATE_KEY>\nand\n<PRIVATE_KEY> end"
        head, _, _ = said.rpartition("-----END")  # somebody cut the text
        for cut, after in ((head, "\nThank you for your help."), (said[: len(said) // 2], "")):
            left = masked(f"it is {cut}{after}")
            assert left.startswith("it is <PRIVATE_KEY>") and left.endswith(after)
            assert not re.search(r"[\w+/]{3}", left.removesuffix(after)[len("it is <PRIVATE_KEY>") :]), (cut[:30], left)


def test_putty_writes_no_end():
    lines = "AAAAB3NzaC1yc2EAAAADAQABAAABAQ" * 2
    key = f"PuTTY-{'User'}-Key-File-2: ssh-rsa\nEncryption: none\nComment: jo key\nPublic-Lines: 1\n{lines}\nab3=\nPrivate-Lines: 2\n{lines}\nab3=\nPrivate-MAC: 0f0f0f"
    assert masked(f"{key}\nand more") == "<PRIVATE_KEY>\nand more"


def test_words_about_a_key_stay():
    said = f"A file with BEGIN RSA {KEY} at its top is secret. -----BEGIN CERTIFICATE-----\nMIIEpAIBAAKCAQEA\n-----END CERTIFICATE-----"
    assert masked(said) == said.replace(f"BEGIN RSA {KEY}", "<PRIVATE_KEY>")


def numbers(rng):
    "IBANs of every length, and card numbers, as they are printed and without spaces."
    for rest in range(11, 30):
        body = "".join(rng.choices("0123456789", k=rest))
        land = rng.choice(("AT", "BE", "ES", "DE"))
        check = 98 - int("".join(str(int(c, 36)) for c in f"{body}{land}00")) % 97
        code = f"{land}{check:02d}{body}"
        assert iban(code)
        yield from (("IBAN_CODE", t) for t in (code, " ".join(code[i : i + 4] for i in range(0, len(code), 4))))
    for groups in ((4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (4, 4, 4, 4, 3)):
        digits = str(rng.randrange(3, 7)) + "".join(rng.choices("0123456789", k=sum(groups) - 2))
        digits += next(c for c in "0123456789" if luhn(digits + c))
        ends = [sum(groups[:i]) for i in range(len(groups) + 1)]
        parts = [digits[a:b] for a, b in zip(ends, ends[1:], strict=False)]
        yield from (("CREDIT_CARD", sep.join(parts)) for sep in ("", " ", "-"))


@pytest.mark.parametrize(
    "after", ["", ".", " is mine", " from my account", " to", " 12/29", " 123", " 12 2029", ", thanks", " and 7 more"]
)
def test_a_number_is_found_whatever_stands_behind_it(after):
    rng = random.Random(1)
    for _ in range(20):
        for entity, number in numbers(rng):
            text = f"It is {number}{after}"
            found = [f for f in find_pii(text) if f.entity == entity]
            # a longer run of digits may pass the check by chance; nothing of the number may be left
            assert len(found) == 1 and found[0].start == 6 and found[0].end >= 6 + len(number), text


@pytest.mark.parametrize(
    "unit",
    [
        "1234 ",
        "1 ",
        "4111-",
        "AB12 ",
        "AB12 34CD ",
        "a@",
        "a.",
        "1.",
        ":a",
        "06 ",
        "0123/",
        "(0",
        "03-1234-",
        "(11) 9",
        "138 1234 ",
        "8 (495) ",
        "::1.",
        "+4 ",
        "é.",
        "1" * 19 + " ",
    ],
)
def test_hostile_digits_take_seconds(unit):
    text = unit * (SIZE // 4 // len(unit)) + "@"
    began = time.process_time()
    find_pii(text)
    assert time.process_time() - began < 3


@pytest.mark.parametrize(
    "number",
    [
        "03-1234-5678", "06-12345678", "02 9876 5432", "(11) 91234-5678", "8 (495) 123-45-67", "138 1234 5678", "1-800-555-0199",
        "::ffff:192.0.2.128", "4111.1111.1111.1111", "555 123 4567", "(555) 123 4567", "1 555 123 4567", "+49 151 / 23 45 67 8",
        "(0 30) 12 34 56", "8-800-555-35-35", "01 234 5678", "09-123 4567", "08 123 456 78",
    ],
)  # fmt: skip
def test_numbers_of_other_lands_go_whole(number):
    assert re.fullmatch(r"It is <[A-Z_]+>, ok\?", masked(f"It is {number}, ok?"))


def test_ids_made_of_times_are_no_cards():
    rng = random.Random(0)
    for size in (13, 16, 18, 19):  # milliseconds, microseconds, those of social networks, nanoseconds
        ids = ["1" + "".join(rng.choices("0123456789", k=size - 1)) for _ in range(300)]
        assert not [i for i in ids if find_pii(i)]


TOKEN = "aB3" * 16
NEWER = {
    "Service token": ["npm" + "_" + TOKEN[:36], "xa" + "pp-1-A1-2-" + TOKEN, "GOC" + "SPX-" + TOKEN[:28], "hv" + "s." + TOKEN, "gs" + "k_" + TOKEN, "dap" + "i" + "0f" * 16],
    "Authorization header": ["Authorization: Bearer " + TOKEN, '{"authorization": "Basic ' + TOKEN + '"}', "-H 'Authorization: token " + TOKEN],
    "Assigned secret": ['{"api_key": "' + TOKEN + '"}', "pass" + "word = 'hunter2hunter2'", '{\\"client_secret\\": \\"' + TOKEN + '\\"}', "X-API-Key: " + TOKEN],
}  # fmt: skip


def test_a_key_behind_a_letter_of_another_script_is_found():
    assert masked(f"令牌hf_{TOKEN}谢谢") == "令牌<HUGGING_FACE_TOKEN>谢谢"


@pytest.mark.parametrize("entity, text", [(e, t) for e, texts in NEWER.items() for t in texts])
def test_keys_of_newer_services_and_in_quotes_are_found(entity, text):
    assert entity in {f.entity for f in find_secrets(f"please use {text} for this")}
    assert TOKEN[:20] not in masked(text) and "hunter2" not in masked(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"pass' + 'word": "string"}', '"api_key": "<your key 1>"', "Authorization: Bearer YOUR_ACCESS_TOKEN", "npm_config_registry_url_default",
        "the password: at least 8 characters", "secret: '${API_SECRET_1}'", "Authorization: Bearer <token-1234567890>",
    ],
)  # fmt: skip
def test_words_about_keys_stay(text):
    assert masked(text) == text


@pytest.mark.parametrize(
    "text, kept",
    [
        ("+86 138 1234 5678", ""),  # its digits pass a card's check
        ("0086 138 1234 5678", ""),
        ("my phone number is 2025550123", "my phone number is "),
        ("Phone: 5551234567.", "Phone: ."),
        ("call me on 9876543210 please", "call me on  please"),
        ("Tel. 301234567", "Tel. "),
        ("WhatsApp:9876543210", "WhatsApp:"),
    ],
)
def test_a_bare_telephone_number_is_found_by_the_word_before_it(text, kept):
    assert mask(text, find_pii(text)).replace("<PHONE_NUMBER>", "") == kept


@pytest.mark.parametrize(
    "text",
    ["order 2025550123", "account number is 1234567890", "I paid 1234567890", "hotel 123456789", "recall 1234567890",
     "the call of 20240131123 shares", "phone 12/05/2024", "call 911", "telephone 123456789012"],
)  # fmt: skip
def test_other_numbers_stay(text):
    assert not find_pii(text)


def test_a_card_behind_a_plus_is_a_card():
    text = "+4111 1111 1111 1111"
    assert mask(text, find_pii(text)) == "+<CREDIT_CARD>"
