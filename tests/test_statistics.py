"The statistics against by-hand sums, statsmodels and simulations; what `compare` refuses"
import hashlib, json, subprocess, sys
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import beta, binom, bootstrap, norm, t, ttest_1samp
from statsmodels.stats.proportion import proportion_confint

from gsm8k_sft.evaluation.compare import compare, compare_seeds
from gsm8k_sft.statistics.intervals import Estimate, mean_interval, pass_at_k, wilson_interval
from gsm8k_sft.statistics.paired import mcnemar, mean_difference, newcombe_interval, paired_bootstrap
from gsm8k_sft.statistics.planning import MINUTES, minimum_detectable_effect, plan_seeds, plan_text, seed_power
from gsm8k_sft.statistics.seeds import holm, seed_difference, seed_estimate, seed_spread, variance_components

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


@pytest.mark.parametrize("confidence", [95, 1, 0, -1, float("nan")])
def test_wilson_at_no_level(confidence):
    with pytest.raises(ValueError, match=f"confidence={confidence}"): wilson_interval(3, 10, confidence)


def test_wilson_of_numpy_counts_is_plain():
    assert {type(x) for x in wilson_interval(np.int64(3), np.int64(10))} == {float}


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
        "exact McNemar p = 0.038: shown to be real at the 5 % level; within ±2 points: not shown.")
    assert compare("a", "c", folder=tmp_path).name_b == "LoRA (run-c)"
    assert compare("a", "a", folder=tmp_path).difference == 0
    assert compare("a", predictions(b), folder=tmp_path).name_b == "model 2"
    assert compare("a", "b", folder=tmp_path, names=("one", "two")).name_a == "one"


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


def test_compare_seeds_is_seed_estimate():
    rng, n = np.random.default_rng(0), 120
    a, b = [rng.random((3, n)) < rng.uniform(0.2, 0.4, (3, 1)) for _ in range(2)]
    found = compare_seeds([predictions(x) for x in a], [predictions(x) for x in b])
    e = seed_estimate(a, b)
    assert (found.difference, found.low, found.high) == pytest.approx((e.difference, *e.interval())) and not found.single


def test_one_seed_is_said():
    a, b = columns(20, 13, 27, 40)
    found = compare_seeds([predictions(a)], [predictions(b)], names=("LoRA", "full SFT"))
    assert "minimum detectable effect" in str(compare_seeds([predictions(a)], [predictions(a)]))
    assert "(over problems)" in str(found) and "The spread between seeds of LoRA and of full SFT is unknown" in str(found)
    assert (found.low, found.high) == pytest.approx(paired_bootstrap(a, b), abs=0.02)


def test_seeds_refuse(tmp_path):
    result(tmp_path, "a", [True, False])
    result(tmp_path, "b", [True, True])
    with pytest.raises(ValueError, match="at least one run"): compare_seeds([GOOD], [])
    with pytest.raises(ValueError, match="a is there twice"): compare_seeds(["a", "a"], ["b"], folder=tmp_path)
    with pytest.raises(ValueError, match="is only in"): compare_seeds([GOOD], [GOOD, GOOD[:1]])


def arm(rng, p, sd, correlation, seeds, ranks, agreement=1.0):
    "Answers (seeds, problems): problems' chances are a beta distribution, which makes answers of seeds correlate; seeds shift all chances"
    own = norm.cdf(agreement ** 0.5 * norm.ppf(ranks) + (1 - agreement) ** 0.5 * rng.normal(size=len(ranks))) if agreement < 1 else ranks
    strength = 1 / correlation - 1
    odds = beta.ppf(np.clip(own, 1e-9, 1 - 1e-9), p * strength, (1 - p) * strength)
    shift = rng.normal(0, sd, (seeds, 1))
    return rng.random((seeds, len(ranks))) < odds + shift * odds * (1 - odds) / np.mean(odds * (1 - odds))


def simulated(p, sd, correlation, seeds, seeds_b=None, more=0, n=1319, repeats=400, agreement=1.0, seed=1):
    "Coverage of zero and the mean width over that of 1.96 true standard errors"
    rng, rows = np.random.default_rng(seed), []
    bank = [arm(rng, p, sd, correlation, seeds, rng.random(n)) for _ in range(200 * bool(more))]
    for _ in range(repeats):
        ranks = rng.random(n)
        a, b = [arm(rng, p, sd, correlation, s, ranks, agreement) for s in (seeds, seeds_b or seeds)]
        e = seed_estimate(a, b, pooled=[bank[i] for i in rng.choice(200, more, replace=False)] if more else None)
        rows.append((e.difference, *e.interval()))
    difference, low, high = np.array(rows).T
    return ((low <= 0) & (high >= 0)).mean(), (high - low).mean() / (2 * 1.96 * difference.std())


@pytest.mark.parametrize("seeds, more, sd, widest", [(2, 8, 0.01, 1.3), (3, 0, 0.0, 1.45), (3, 6, 0.02, 1.25), (5, 4, 0.005, 1.2)])
def test_seed_differences_hold_the_truth(seeds, more, sd, widest):
    "With another kind of problems than the chapter's: a few hundred studies, so within three standard errors of 0.935 to 0.97"
    held, width = simulated(0.3, sd, 0.3, seeds, more=more, n=500)
    assert 0.935 - 0.033 <= held <= 0.97 + 0.026 and width < widest


@pytest.mark.slow
@pytest.mark.parametrize("seeds, more", [(2, 4), (3, 0), (3, 4), (5, 0), (5, 4)])
@pytest.mark.parametrize("correlation, agreement", [(0.3, 1.0), (0.6, 0.7)])
def test_coverage_of_seed_differences_over_the_grid(seeds, more, correlation, agreement):
    for p in (0.1, 0.3, 0.55):
        for sd in (0, 0.005, 0.01, 0.02):
            held, _ = simulated(p, sd, correlation, seeds, more=more, repeats=2000, agreement=agreement)
            assert 0.935 - 0.015 <= held <= 0.97 + 0.012, (p, sd, held)


def test_seed_differences_with_unequal_seeds():
    held, _ = simulated(0.3, 0.01, 0.3, 2, 5, more=8, n=500)
    assert 0.9 <= held <= 0.99
    rng = np.random.default_rng(0)
    a, b = [rng.random((s, 300)) < 0.3 for s in (1, 3)]
    errors = [seed_estimate(*pair).error for pair in ((a, b), (a, b[:1]))]
    assert all(e > 0 for e in errors) and seed_spread([a, b]).dof == 2 and seed_spread([a, b[:1]]).dof == 0


def test_seed_differences_by_hand():
    "Two-way analysis of variance written out, and Satterthwaite's degrees of freedom"
    rng = np.random.default_rng(4)
    a, b = rng.random((3, 200)) < rng.uniform(0.1, 0.5, (3, 1)), rng.random((4, 200)) < rng.uniform(0.1, 0.5, (4, 1))
    excess, noise = 0, 0
    for x in (a, b):
        residual = x - x.mean(axis=0) - x.mean(axis=1, keepdims=True) + x.mean()
        luck = (residual ** 2).sum() / (len(x) - 1) / 199 / 200
        excess, noise = excess + (len(x) - 1) * (x.mean(axis=1).var(ddof=1) - luck) / 5, noise + (len(x) - 1) * luck / 5
    assert seed_spread([a, b]) == pytest.approx((excess, noise, 5)) and excess > noise
    share, d = 1 / 3 + 1 / 4, b.mean(axis=0) - a.mean(axis=0)
    problems = (d.var() * 200 + share / 2) / 199 / 200
    variance = problems + share * excess
    dof = variance ** 2 / (problems ** 2 / 199 + (share * (excess + noise)) ** 2 / 5)
    half = t.ppf(0.975, dof) * variance ** 0.5
    found = seed_estimate(a, b)
    assert found == pytest.approx((d.mean(), variance ** 0.5, dof))
    assert found.interval() == pytest.approx((d.mean() - half, d.mean() + half))
    assert seed_difference(a, b) == (found.difference, *found.interval()) and seed_difference(a, b, 0.5)[1:] == found.interval(0.5)
    assert seed_estimate(b, a) == pytest.approx((-d.mean(), *found[1:]))
    assert seed_estimate(a.tolist(), b.astype(int), pooled=[b, a, a]) == pytest.approx(found)
    (low, high), narrow = found.interval(), found.interval(confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_seeds_paired_and_fixed():
    rng = np.random.default_rng(0)
    a = rng.random((4, 500)) < rng.uniform(0.2, 0.6, (4, 1))
    gain = a | (rng.random(a.shape) < 0.04)
    apart, paired = seed_estimate(a, gain), seed_estimate(a, gain, paired=True)
    assert paired.difference == apart.difference and paired.error < apart.error / 3
    assert seed_estimate(a[:1], gain, fixed="a").error < seed_estimate(a[:1], gain).error
    for change, words in (({"a": a[0]}, "one seed of a list"), ({"a": a * 2}, "right or wrong"), ({"a": a[:, :7]}, "a has 7 problems"),
                         ({"a": a[:2], "paired": True}, "a has 2 seeds and b 4"), ({"a": a[:, :1], "b": a[:, :1]}, "at least two"),
                         ({"pooled": [a[0]]}, "one seed of a list"), ({"a": a[:0]}, "are needed"), ({"b": gain * np.nan}, "are needed"),
                         ({"pooled": [np.where(a, np.nan, 1)]}, "are needed")):
        with pytest.raises(ValueError, match=words): seed_estimate(**{"a": a, "b": gain} | change)
    with pytest.raises(ValueError, match="confidence=95"): apart.interval(95)


def test_seeds_without_any_difference_are_no_certainty():
    for x in (np.zeros((3, 100), bool), np.ones((1, 100), bool)):
        found = seed_estimate(x, x)
        low, high = found.interval()
        assert found.difference == 0 and -0.05 < low < 0 < high < 0.05


def test_equivalence_is_two_one_sided_tests():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 900)) < 0.3
    d = b.astype(float) - a
    e = mean_difference(a, b)
    for margin in (0.01, 0.03, 0.05, 0.1):
        below, above = ttest_1samp(d, margin, alternative="less").pvalue, ttest_1samp(d, -margin, alternative="greater").pvalue
        assert e.equivalence(margin) == (below < 0.05 and above < 0.05, above < 0.05, below < 0.05)
    assert e.p() == pytest.approx(ttest_1samp(d, 0).pvalue)
    with pytest.raises(ValueError, match="two points"): e.equivalence(2)


def test_detectable_effects_are_found_four_times_in_five():
    rng, e = np.random.default_rng(0), Estimate(0.0, 0.01, 12)
    d, error = rng.normal(e.detectable(), 0.01, 20_000), 0.01 * (rng.chisquare(12, 20_000) / 12) ** 0.5
    assert (d / error > t.ppf(0.975, 12)).mean() == pytest.approx(0.8, abs=0.02)


def test_templates_count_once():
    "Variants that are all alike say as much as one of each; the coverage with templates that are solved or not"
    rng = np.random.default_rng(0)
    one, two = rng.random((2, 60)) < 0.4
    alike = mean_difference(np.repeat(one, 7), np.repeat(two, 7), np.repeat(np.arange(60), 7))
    assert alike == pytest.approx(mean_difference(one, two))
    assert mean_difference(one, two, list(map(str, range(60)))) == pytest.approx(mean_difference(one, two))
    groups, held = np.repeat(np.arange(50), 8), []
    for _ in range(600):
        a, b = [rng.random(400) < np.repeat(rng.beta(0.5, 0.5, 50), 8) for _ in range(2)]
        low, high = mean_difference(a, b, groups).interval()
        held.append(low <= 0 <= high)
    assert np.mean(held) == pytest.approx(0.95, abs=0.027)
    for wrong, words in (
            ((one, two, groups), "400 of them for 60"), ((one[:1], two[:1]), "at least two"), ((one, two[:9]), "two flat lists"),
            ((one, two * np.nan), "with NaN"), ((one[:1], two), "two flat lists"), ((one[None], two[None]), "two flat lists")):
        with pytest.raises(ValueError, match=words): mean_difference(*wrong)


def test_variance_components_find_what_was_put_in():
    rng = np.random.default_rng(0)
    arms = [arm(rng, 0.3, 0.03, 0.4, 3, rng.random(1000)) for _ in range(60)]
    found = variance_components(arms, [(0.30, 0.42)], [(0.30, 0.40, 0.35)], 500)
    total = 0.3 * 0.7 / 1000
    assert found["problems"] == pytest.approx(0.4 * total, rel=0.15)
    assert found["luck on single problems"] == pytest.approx(0.6 * total, rel=0.05)
    assert found["seeds, beyond that"] == pytest.approx(0.03 ** 2, rel=0.35) and found["sampling"] == pytest.approx(0.12 / 1000)
    assert found["learning rate"] == pytest.approx(0.0025 - 2 * found["luck on single problems"])
    with pytest.raises(ValueError, match="at least two seeds"): variance_components([arms[0][:1]])


@pytest.mark.parametrize("seeds, difference, sd", [(3, 0.03, 0.005), (2, 0.03, 0.0), (5, 0.04, 0.02)])
def test_planned_power_by_simulation(seeds, difference, sd):
    rng, found, n = np.random.default_rng(2), 0, 1319
    for _ in range(400):
        ranks = rng.random(n)
        a, b = [arm(rng, p, sd, 0.4, seeds, ranks) for p in (0.3, 0.3 + difference)]
        low, high = seed_estimate(a, b).interval()
        found += low > 0 or high < 0
    # three standard errors of 400 studies
    assert seed_power(difference, 0.3, seeds, seed_sd=sd, within=0.4, between=0.4) == pytest.approx(found / 400, abs=0.075)


def test_plans():
    plan = plan_seeds(0.10, 0.02)
    assert seed_power(0.02, 0.10, plan["seeds"]) >= 0.8 > seed_power(0.02, 0.10, plan["seeds"] - 1)
    assert seed_power(0.02, 0.10, problems=plan["problems"]) >= 0.8 > seed_power(0.02, 0.10, problems=int(plan["problems"] * 0.97))
    assert seed_power(0.02, 0.10, draws=plan["draws"]) >= 0.8 > seed_power(0.02, 0.10, draws=plan["draws"] - 1)
    assert plan["power"] == seed_power(0.02, 0.10) and seed_power(plan["detectable"], 0.10) == pytest.approx(0.8, abs=1e-3)
    assert 0.025 < seed_power(0, 0.3) < 0.065
    hopeless = plan_seeds(0.3, 0.01, seed_sd=0.02, seeds=2)
    assert hopeless["problems"] is None and "no number of problems is enough" in plan_text(0.3, 0.01, seed_sd=0.02, seeds=2)
    assert "GPU minutes of 10 runs: 30." in plan_text(0.10, 0.02, minutes_per_run=3)
    for wrong in ({"accuracy": 0}, {"difference": 2}, {"difference": -0.02}, {"accuracy": 0.99}, {"power": 80}, {"seeds": 1},
                  {"problems": 0}, {"accuracy": float("nan")}, {"draws": 0}, {"seed_sd": -0.01}, {"seed_sd": float("nan")}, {"within": 1},
                  {"between": 2}, {"drawn": -1}):
        with pytest.raises(ValueError): plan_seeds(**{"accuracy": 0.10, "difference": 0.02} | wrong)


def test_the_planner_is_a_command():
    def run(*more): return subprocess.run([sys.executable, "-m", "gsm8k_sft.statistics.planning", *more], capture_output=True, text=True)
    found = run("--accuracy", "0.10", "--difference", "0.02", "--power", "0.8")
    assert found.stdout.startswith(plan_text(0.10, 0.02, 0.8)) and not found.stderr
    assert run("--difference", "2").stderr.startswith("error: accuracy=0.1, difference=2.0")


def test_planned_minutes_are_those_of_the_studies():
    from gsm8k_sft.experiments.tables import cost_table
    for row in cost_table().to_dict("records"):
        training, answers = MINUTES[row["model"]]
        assert training == pytest.approx(row["a training, s"] / row["workers"] / 60, rel=0.5), row["model"]
        assert answers == pytest.approx(row["an evaluation, s"] / row["workers"] / 60, rel=0.5), row["model"]


def test_importing_it_imports_nothing_else():
    "The floor is at the bottom of the house, and the slow libraries are for those who call"
    others = ("gsm8k_sft.", "scipy", "pandas", "torch", "statsmodels")
    code = ("import sys; import gsm8k_sft.statistics, gsm8k_sft.statistics.planning; "
            f"print([m for m in sys.modules if m.startswith({others}) and 'statistics' not in m])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_holm_counts_what_was_named_and_is_not_there_yet():
    p = [0.04, 0.01]
    assert holm(p).tolist() == [0.04, 0.02]
    assert holm(p, 5).tolist() == pytest.approx([0.16, 0.05]) and holm([], 3).tolist() == []
