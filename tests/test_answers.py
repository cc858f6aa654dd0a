"""Grading against lm-evaluation-harness's own steps, written out."""
import random, re, time

import pytest

from gsm8k_sft.answers import final_number, grade

FILTERS = {"strict": (r"#### (\-?[0-9\.\,]+)", 0), "flexible": (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)}


def harness(text, gold, name):
    "RegexFilter, take_first, exact_match_hf_evaluate: what lm_eval 0.4 does to one response"
    pattern, select = FILTERS[name]
    match = re.findall(pattern, text)
    found = "[invalid]"
    if match:
        found = match[select]
        if isinstance(found, tuple): found = [m for m in found if m][0]
        found = found.strip()
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"): found, gold = re.sub(ignored, "", found), re.sub(ignored, "", gold)
    return found.lower() == gold.lower()


def test_as_the_harness_on_random_texts():
    rng, pieces = random.Random(0), ["#### ", "####", "18", "1,8", "$", ".", ",", "-", " ", "\n", "0", "eggs", "#", "\u0661", "18.00"]
    for _ in range(20_000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 8)))
        gold = rng.choice(["18", "-18", "1,800", "so it is\n#### 18", "#### 0", "step\n#### 1,8"])
        got = grade(text, gold)
        for name in FILTERS: assert got[name] == harness(text, gold, name), (text, gold, name)


@pytest.mark.parametrize("text", [None, 18, b"#### 18", [], float("nan")])
def test_what_is_not_text_is_wrong_and_never_raises(text):
    assert grade(text, "18") == {"strict": False, "flexible": False, "extracted_strict": None, "extracted_flexible": None}
    assert not grade("#### 18", text)["strict"]


def test_odd_characters_never_raise():
    for text in ("\x00", "\ud800 #### 18", "#### ١٨", "\u2028#### 18"): grade(text, "18")
    assert grade("\ud800 #### 18", "18")["strict"]


@pytest.mark.parametrize("text", ["9," * 500_000, "#### " + "9," * 500_000, "#### " * 200_000, "$." * 500_000, "-" * 1_000_000])
def test_a_megabyte_takes_milliseconds(text):
    start = time.perf_counter()
    grade(text, text)
    assert time.perf_counter() - start < 2


def test_final_number():
    assert final_number("a\n#### 1,234") == "1234" and final_number("#### 1\n#### 2 ") == "2"
    assert final_number("") is None and final_number("####") == ""
