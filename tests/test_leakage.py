"The audit of near copies: each level, odd texts, and the numbers known for GSM8K"
import random, time

import pytest

from gsm8k_sft.core.config import load_config
from gsm8k_sft.data.contamination import leakage_audit
from gsm8k_sft.data.datasets import load_gsm8k
from gsm8k_sft.data.problems import DataError, data_folder

LONG = "Ann has 3 red apples and 4 green pears in a big round basket on the old wooden table"


def rows(*questions, split="train"): return [{"id": f"main/{split}/{i}", "question": q} for i, q in enumerate(questions)]
def audit(train, test, **given): return leakage_audit(rows(*train), rows(*test, split="test"), **given)


@pytest.mark.parametrize("test, level, words", [
    (LONG, "same text", 19),
    (f"  {LONG.upper()}!? ", "normalised", 19),
    (LONG.replace("3", "1,250").replace("4", "0.5"), "numbers masked", 19),
    ("Once more: " + LONG + ", or so.", "13 words", 19),
    ("Bob says that Ann has 7 red apples and 9 green pears in a big round basket.", "13 words, numbers masked", 14)])
def test_levels(test, level, words):
    found = audit([LONG], [test])
    shared = found["shared"][0]
    pair = {"level": level, "test": "main/test/0", "train": "main/train/0", "words": words, "shared": shared}
    assert found.to_dict("records") == [pair]
    assert len(shared.split()) == words


def test_thirteen_words_are_needed():
    words = LONG.split()
    assert len(audit([LONG], [" ".join(words[:13]) + " x"])) == 1
    assert len(audit([LONG], [" ".join(words[:12]) + " x"])) == 0
    assert len(audit([LONG], [" ".join(words[:12]) + " x"], n=12)) == 1


def test_short_questions_are_compared_as_a_whole():
    assert list(audit(["How many?", "How many apples?"], ["how many"])["level"]) == ["normalised"]
    assert list(audit(["one two"], ["two one"], n=1)["shared"]) in (["one"], ["two"])


def test_unicode():
    assert list(audit(["Zoë’s café – 3 ﬁgs"], ["ZOE\u0308S CAFE\u0301 3 figs"])["level"]) == ["normalised"]
    assert list(audit(["Straße 5"], ["STRASSE 5"])["level"]) == ["normalised"]
    assert list(audit(["\u0663 apples"], ["3 apples"])["level"]) == ["numbers masked"]
    assert list(audit(["How\u2028many \u00a0apples"], ["how many apples"])["level"]) == ["normalised"]


def test_nothing_to_find():
    for train, test in (([], []), ([LONG], []), ([], [LONG]), (["???", ""], ["!!", "..."])):
        found = audit(train, test)
        assert len(found) == 0 and list(found["level"].cat.categories)[3:] == ["13 words", "13 words, numbers masked"]
        assert list(found.columns) == ["level", "test", "train", "words", "shared"]
    with pytest.raises(DataError, match="at least 1"): audit([], [], n=0)


def test_every_pair_once_and_on_its_strictest_level():
    found = audit([LONG, LONG + " now", "Bob. " + LONG], [LONG, LONG.lower()])
    assert not found.duplicated(["test", "train"]).any() and len(found) == 6
    assert list(found[found["train"] == "main/train/0"]["level"]) == ["same text", "normalised"]


def test_against_all_pairs():
    "The index finds what comparing every question with every other finds"
    rng, vocabulary = random.Random(0), "a b c 1 22".split()
    train, test = [[" ".join(rng.choices(vocabulary, k=rng.randint(0, 8))) for _ in range(40)] for _ in range(2)]
    def runs(text): return {tuple(w[i:i + 3]) for w in [text.split()] for i in range(len(w) - 2)}
    slow = {(i, j) for i, q in enumerate(test) for j, r in enumerate(train)
            if runs(q) & runs(r) or q and q.replace(" ", "") == r.replace(" ", "")}
    found = audit(train, test, n=3)
    strict = found[found["level"].isin(["same text", "normalised", "3 words"])]
    here = {(int(t.rsplit("/")[-1]), int(r.rsplit("/")[-1])) for t, r in zip(strict["test"], strict["train"])}
    masked = {(int(t.rsplit("/")[-1]), int(r.rsplit("/")[-1])) for t, r in zip(found["test"], found["train"])}
    assert here <= slow <= masked


def test_datasets_as_they_are_loaded():
    problems = load_gsm8k(load_config("toy", training=False))
    start = time.perf_counter()
    found = leakage_audit(problems["train"], problems["test"])
    assert time.perf_counter() - start < 10
    assert not found["level"].isin(["same text", "normalised"]).any()


def test_gsm8k():
    cfg = load_config("gemma-3-270m", training=False)
    if data_folder(cfg) is None: pytest.skip("no GSM8K folder is named")
    problems = load_gsm8k(cfg)
    def problems_of_each_level(split):
        found = leakage_audit(problems["train"], problems[split])
        return found.groupby("level", observed=False)["test"].nunique().tolist()
    assert problems_of_each_level("test") == [0, 0, 0, 3, 4]
    assert problems_of_each_level("validation") == [0, 0, 0, 3, 0]
