"The statistics against by-hand sums, statsmodels and simulations; what `compare` refuses"
import hashlib, json, subprocess, sys
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import binom, bootstrap
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from gsm8k_sft.evaluation.compare import compare, compare_many, compare_seeds
from gsm8k_sft.statistics import (
    mcnemar, mean_interval, minimum_detectable_effect, newcombe_interval, paired_bootstrap, pass_at_k, seed_interval,
    two_level_bootstrap, wilson_interval)

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def columns(both, only_a, only_b, neither):
    "Two lists of answers with these counts"
    return [list(x) for x in zip(*[(True, True)] * both, *[(True, False)] * only_a, *[(False, True)] * only_b, *[(False, False)] * neither)]


def predictions(answers, **more): return [{"id": f"main/test/{i}", "strict": bool(x), **more} for i, x in enumerate(answers)]


def by_hand(only_a, only_b):
    "Sum of the probabilities of all splits no likelier than this one"
    n = only_a + only_b
    return sum(comb(n, k) for k in range(n + 1) if comb(n, k) <= comb(n, only_a)) / 2 ** n


@pytest.mark.parametrize("only_a, only_b", [(0, 0), (0, 1), (0, 6), (3, 3), (5, 12), (37, 23), (56, 86)])
def test_mcnemar_is_a_binomial_sum(only_a, only_b):
    found = mcnemar(*columns(4, only_a, only_b, 5))
    assert found == {"both": 4, "only_a": only_a, "only_b": only_b, "neither": 5, "p": pytest.approx(by_hand(only_a, only_b), rel=1e-9)}


@pytest.mark.parametrize("a, b", [
    ([], []),
    ([True], []),
    ([True, 2], [True, False]),
    ([[True]], [[True]]),
    ([None], [True]),
    (["yes"], ["no"])])
def test_answers_that_are_none(a, b):
    for function in (mcnemar, paired_bootstrap, newcombe_interval):
        with pytest.raises(ValueError): function(a, b)


@given(PAIRS)
@settings(deadline=None, max_examples=60)
def test_swapping_turns_everything_round(pairs):
    a, b = map(list, zip(*pairs))
    there, back = compare(predictions(a), predictions(b)), compare(predictions(b), predictions(a))
    assert there.difference == -back.difference and there.p == back.p and (there.only_a, there.only_b) == (back.only_b, back.only_a)
    assert newcombe_interval(a, b) == pytest.approx([-x for x in newcombe_interval(b, a)[::-1]])
    assert -1 - 1e-12 <= there.low <= there.difference + 1e-12 and there.difference - 1e-12 <= there.high <= 1 + 1e-12
    assert there.both + there.only_a + there.only_b + there.neither == len(pairs) and 0 < there.p <= 1


@given(st.lists(st.booleans(), min_size=1, max_size=60))
@settings(deadline=None, max_examples=30)
def test_the_same_answers_differ_by_nothing(a):
    found = compare(predictions(a), predictions(a))
    assert (found.difference, found.p, found.shown, found.method) == (0, 1, False, "Newcombe")
    assert paired_bootstrap(a, a) == (0, 0) and found.low < 0 < found.high and "-0.0 points" not in str(found)


def test_bootstrap_is_scipys():
    a, b = map(np.array, columns(60, 23, 37, 400))
    reference = bootstrap((b.astype(float) - a,), np.mean, method="percentile", n_resamples=9999).confidence_interval
    assert paired_bootstrap(a, b) == pytest.approx(tuple(reference), abs=0.004)
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b)
    assert len({paired_bootstrap(a, b, n_resamples=20, seed=s) for s in range(5)}) > 1
    assert paired_bootstrap(a, b, confidence=0.5)[0] > paired_bootstrap(a, b)[0]


@pytest.mark.parametrize("counts", [(100, 23, 37, 1159), (300, 56, 86, 877), (5, 40, 41, 300)])
def test_bootstrap_agrees_with_newcombe(counts):
    a, b = columns(*counts)
    assert paired_bootstrap(a, b) == pytest.approx(newcombe_interval(a, b), abs=0.004)


def test_newcombe_as_published():
    "Newcombe 1998, method 10, the table 36, 12, 2, 0"
    assert newcombe_interval(*columns(36, 12, 2, 0)) == pytest.approx((-0.3404, -0.0569), abs=1e-4)


def test_coverage():
    rng, truth, held = np.random.default_rng(0), 0.04, []
    for counts in rng.multinomial(500, [0.1, 0.04, 0.08, 0.78], 600):
        a, b = columns(*counts)
        held.append([low <= truth <= high for low, high in (paired_bootstrap(a, b, n_resamples=1000), newcombe_interval(a, b))])
    assert (np.abs(np.mean(held, axis=0) - 0.95) < 0.025).all()


@pytest.mark.parametrize("k, n", [(0, 1), (1, 1), (91, 1319), (1319, 1319)])
def test_wilson(k, n):
    low, high = wilson_interval(k, n, 0.9)
    assert (low, high) == pytest.approx(proportion_confint(k, n, 0.1, "wilson")) and 0 <= low <= k / n <= high <= 1


@pytest.mark.parametrize("k, n", [(0, 0), (2, 1), (-1, 5), (0, -1)])
def test_wilson_of_nothing(k, n):
    with pytest.raises(ValueError, match=f"{k} right of {n} answers"): wilson_interval(k, n)


def test_seed_interval():
    assert seed_interval([0.08]) == (0.08, None, None) and seed_interval([0.08, 0.08]) == (0.08, 0.08, 0.08)
    mean, low, high = seed_interval([0.07, 0.08, 0.12])
    assert mean == pytest.approx(0.09) and low < 0.07 and high > 0.1 and low < seed_interval([0.07, 0.08, 0.12], 0.5)[1]
    for values in ([], [float("nan")], [[0.1]]):
        with pytest.raises(ValueError): seed_interval(values)


def test_several_answers_to_a_problem():
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5) and mean_interval([0.0, 1.0])[0] == 0.0 and mean_interval([1.0]) == (1.0, 1.0)
    for wrong in ((3, 1, 4), (3, 4, 1), (3, 1, 0)):
        with pytest.raises(ValueError, match="pass_at_k"): pass_at_k(*wrong)
    assert pass_at_k(5, 0, 5) == 0 and pass_at_k(5, 1, 5) == 1


@pytest.mark.parametrize("n, discordant", [(1319, 0.05), (1319, 0.2), (300, 0.3)])
def test_smallest_paired_difference_by_simulation(n, discordant):
    d = minimum_detectable_effect(n, discordant=discordant)
    only_a, only_b, _ = np.random.default_rng(0).multinomial(n, [(discordant - d) / 2, (discordant + d) / 2, 1 - discordant], 20_000).T
    p = 2 * binom.cdf(np.minimum(only_a, only_b), only_a + only_b, 0.5)
    assert (p <= 0.05).mean() == pytest.approx(0.8, abs=0.012)


@pytest.mark.parametrize("p", [0.08, 0.2, 0.5])
def test_smallest_unpaired_difference_by_simulation(p, n=1319):
    d = minimum_detectable_effect(n, p)
    x, y = np.random.default_rng(0).binomial(n, [[p], [p + d]], (2, 20_000)) / n
    pooled = (x + y) / 2
    assert (np.abs(y - x) > 1.959964 * np.sqrt(2 * pooled * (1 - pooled) / n)).mean() == pytest.approx(0.8, abs=0.012)


def test_smallest_difference_says_what_it_lacks():
    for lacking in ({}, {"p": 1.0}, {"p": -0.1}, {"discordant": 0}, {"p": 0.9, "n": 20}, {"discordant": 0.01, "n": 100}):
        with pytest.raises(ValueError): minimum_detectable_effect(**lacking)
    assert minimum_detectable_effect(p=0.08, power=0.9) > minimum_detectable_effect(p=0.08) > minimum_detectable_effect(2000, 0.08)


GOOD = predictions([True, False, True])


@pytest.mark.parametrize("other, words", [
    (GOOD[:2], "main/test/2 is only in model 1"),
    (GOOD + [{"id": "main/test/3", "strict": True}], "main/test/3 is only in model 2"),
    (GOOD + GOOD[1:], "model 2: main/test/1 is there twice"),
    (GOOD[:2] + [{"id": "main/test/2", "flexible": True}], r"main/test/2 has no 'strict' .* \['flexible'\]"),
    (GOOD[:2] + [{"id": "main/test/2", "strict": None}], "main/test/2 has no 'strict'"),
    (GOOD[:2] + [{"strict": True}], "without an id"), ([], "no predictions")])
def test_compare_refuses(other, words):
    with pytest.raises(ValueError, match=words): compare(GOOD, other)
    named = words.replace("model 1", "baseline").replace("model 2", "other")
    with pytest.raises(ValueError, match=named): compare_many({"other": other}, GOOD)


def test_the_same_id_of_another_question():
    for one, other in (({"question": "a"}, {"question": "b"}), ({"gold": "1"}, {"gold": "2"})):
        a, b = predictions([True], **one), predictions([True], **other)
        with pytest.raises(ValueError, match="main/test/0 is another question"): compare(a, b)


def test_the_order_of_predictions_does_not_matter():
    a, b = columns(20, 13, 27, 40)
    one, other = compare(predictions(a), predictions(b)), compare(predictions(a)[::-1], predictions(b))
    assert one == other and one.method == "paired bootstrap" and one.only_b == 27


def result(folder, name, answers, kind="lora", split="test", **protocol):
    "A finished evaluation in `folder`, as far as `compare` reads it"
    text = "".join(json.dumps(p) + "\n" for p in predictions(answers))
    record = {"schema_version": 1, "name": name, "model_type": kind, "split": split, "dataset": "main", "base_model": "toy",
              "configuration": {"run_name": f"run-{name}"},
              "protocol": {"grader": "g", "data_fingerprint": "d", "fingerprint": "f", **protocol},
              "predictions_sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / f"{name}.predictions.jsonl").write_text(text)
    (folder / f"{name}.json").write_text(json.dumps(record))
    return record


def test_results_from_a_folder(tmp_path):
    a, b = columns(20, 13, 27, 40)
    result(tmp_path, "a", a)
    record = result(tmp_path, "b", b, "full")
    result(tmp_path, "c", b)
    assert str(compare("a", record, folder=tmp_path)) == (
        "LoRA answers 33.0 % and full SFT 47.0 % of the same 100 problems right (strict): a difference of +14.0 points, "
        "95 % interval [+2.0, +26.0] (paired bootstrap); 40 problems are solved by one alone, 13 by the first and 27 by the second, "
        "exact McNemar p = 0.038: shown to be real at the 5 % level.")
    assert compare("a", "c", folder=tmp_path).name_b == "LoRA (run-c)"
    assert compare("a", "a", folder=tmp_path).difference == 0
    assert compare("a", predictions(b), folder=tmp_path).name_b == "model 2"
    assert compare("a", "b", folder=tmp_path, names=("one", "two")).name_a == "one"
    assert list(compare_many(["a", "b", "c"], "a", folder=tmp_path).index) == ["full SFT (run-b)", "LoRA (run-c)"]


def test_results_that_do_not_go_together(tmp_path):
    a, b = columns(20, 13, 27, 40)
    result(tmp_path, "a", a)
    result(tmp_path, "validation", b, split="validation")
    result(tmp_path, "data", b, data_fingerprint="e")
    result(tmp_path, "grader", b, grader="h")
    stale = result(tmp_path, "stale", a)
    for name in ("stale", "gone"): result(tmp_path, name, b)
    differ = {"validation": "split: 'test' and 'validation'", "data": "data_fingerprint: 'd' and 'e'", "grader": "grader: 'g' and 'h'"}
    for name, words in differ.items():
        with pytest.raises(ValueError, match=words): compare("a", name, folder=tmp_path)
    with pytest.raises(ValueError, match="not those that the result was made from"): compare("a", stale, folder=tmp_path)
    with pytest.raises(ValueError, match="no such predictions"): compare("a", "nothing", folder=tmp_path)
    (tmp_path / "gone.json").unlink()
    with pytest.raises(ValueError, match="no such result"): compare("a", "gone", folder=tmp_path)


def test_holm():
    rng = np.random.default_rng(0)
    models = {str(i): predictions(rng.random(300) < 0.2 + 0.05 * i) for i in range(5)}
    table = compare_many(models, "0")
    assert table["p_holm"].to_numpy() == pytest.approx(multipletests(table["p"], method="holm")[1])
    assert list(table["shown"]) == list(table["p_holm"] <= 0.05) and list(table.index) == list("1234")
    same = compare_many([models[k] for k in "1234"], models["0"])
    assert same["p"].to_numpy() == pytest.approx(table["p"].to_numpy())


def test_seeds_against_the_drawn_out_bootstrap():
    "Two levels, written out: draw seeds of each side, draw problems, average"
    rng, n = np.random.default_rng(0), 120
    a, b = [rng.random((3, n)) < rng.uniform(0.2, 0.4, (3, 1)) for _ in range(2)]
    slow = []
    for _ in range(4000):
        items, drawn = rng.integers(n, size=n), [rng.integers(3, size=3) for _ in range(2)]
        parts = [(x[:, items].mean(axis=1), s) for x, s in ((a, drawn[0]), (b, drawn[1]))]
        means = [acc.mean() + (acc[s].mean() - acc.mean()) * 1.5 ** 0.5 for acc, s in parts]
        slow.append(means[1] - means[0])
    found = compare_seeds([predictions(x) for x in a], [predictions(x) for x in b])
    assert (found.low, found.high) == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.012)
    assert found.difference == pytest.approx(b.mean() - a.mean()) and not found.single


def test_one_seed_is_said():
    a, b = columns(20, 13, 27, 40)
    found = compare_seeds([predictions(a)], [predictions(b)], names=("LoRA", "full SFT"))
    assert "bootstrap over problems" in str(found) and "The spread between seeds of LoRA and of full SFT is unknown" in str(found)
    assert (found.low, found.high) == pytest.approx(paired_bootstrap(a, b), abs=0.02)


def test_seeds_refuse(tmp_path):
    result(tmp_path, "a", [True, False])
    result(tmp_path, "b", [True, True])
    with pytest.raises(ValueError, match="at least one run"): compare_seeds([GOOD], [])
    with pytest.raises(ValueError, match="a is there twice"): compare_seeds(["a", "a"], ["b"], folder=tmp_path)
    with pytest.raises(ValueError, match="is only in"): compare_seeds([GOOD], [GOOD, GOOD[:1]])


def test_two_level_bootstrap_is_of_arrays_alone():
    a, b = [np.random.default_rng(s).random((3, 200)) < 0.3 for s in (0, 1)]
    low, high = two_level_bootstrap(a, b)
    assert (low, high) == two_level_bootstrap(a, b, seed=0) != two_level_bootstrap(a, b, seed=1) and low < b.mean() - a.mean() < high
    found = compare_seeds([predictions(x) for x in a], [predictions(x) for x in b])
    assert (found.low, found.high) == (low, high)
    narrow = two_level_bootstrap(a, b, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_importing_it_imports_nothing_else():
    "It is at the bottom of the house, and the slow libraries are for those who call"
    others = ("gsm8k_sft.", "scipy", "pandas", "torch", "statsmodels")
    code = f"import sys, gsm8k_sft.statistics; print([m for m in sys.modules if m.startswith({others}) and 'statistics' not in m])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
