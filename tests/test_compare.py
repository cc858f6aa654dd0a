"What can't be compared: refused, or a bare difference that says why, in tables, figures and the explorer too"
import json, warnings
from hashlib import sha256
import numpy as np
import pytest
from gsm8k_sft.core.config import project_path
from gsm8k_sft.evaluation.compare import BareDifference, NotComparable, compare, compare_seeds
from gsm8k_sft.grading.answers import GRADERS, grader_versions
from gsm8k_sft.evaluation.results import CLUSTERS, Predictions, accuracies, for_one_table, read_evaluations, read_predictions
from gsm8k_sft.experiments.tables import _pair
from gsm8k_sft.reporting.curves import discordant_pairs, summary_table
from gsm8k_sft.reporting.tables import average_seeds, comparison_table, read_answers
from gsm8k_sft.site.widgets import pair_answers, read_pair
from gsm8k_sft.statistics.paired import mean_difference

OTHER = {"split": "validation", "grader": "strict, of before", "data_fingerprint": "of other data", "max_new_tokens": 16}


@pytest.fixture
def folder(tmp_path):
    "The toy's seed 0 evaluations as files, laid out as results/"
    for e in read_evaluations("toy", project_path("results")):
        if "-s1__" in e["name"] or "-s2__" in e["name"] or "1shot" in e["name"]: continue
        save(tmp_path, {k: v for k, v in e.items() if k != "file"}, read_predictions(e, e["file"].parent))
    return tmp_path

def save(folder, record, answers):
    text, at = "".join(json.dumps(a) + "\n" for a in answers), folder / "toy" / "eval"
    at.mkdir(parents=True, exist_ok=True)
    (at / f"{record['name']}.predictions.jsonl").write_text(text)
    (at / f"{record['name']}.json").write_text(json.dumps(record | {"predictions_sha256": sha256(text.encode()).hexdigest()}))

def lora(folder): return next(e for e in read_evaluations("toy", folder) if e["model_type"] == "lora")
def full(folder): return next(e for e in read_evaluations("toy", folder) if e["model_type"] == "full")

def changed(folder, key, part=None):
    "The LoRA run's evaluation under another fact, or with answers to the first problems alone"
    e = lora(folder)
    answers = list(read_predictions(e, e["file"].parent))[:part]
    record = {k: v for k, v in e.items() if k != "file"}
    if key: record = record | ({key: OTHER[key]} if key in record else {"protocol": record["protocol"] | {key: OTHER[key]}})
    save(folder, record, answers)
    return lora(folder)


@pytest.mark.parametrize("key, part", [*((k, None) for k in OTHER), (None, 400)])
def test_every_way_of_comparing_refuses_and_says_why(folder, key, part):
    a, b = full(folder), changed(folder, key, part)
    at, why = a["file"].parent, key or "is only in"
    lists = [read_predictions(e, at) for e in (a, b)]
    for pair in ((a, b), (a["name"], b["name"]), lists):
        with pytest.raises(NotComparable, match=why): compare(*pair, folder=at)
        with pytest.raises(NotComparable, match=why): compare_seeds(*([x] for x in pair), folder=at)
        found = compare(*pair, folder=at, bare=True), compare_seeds(*([x] for x in pair), folder=at, bare=True)
        for d in found:
            assert isinstance(d, BareDifference) and (d.low, d.high, d.p, d.shown) == (None, None, None, False) and why in str(d)
            assert d.difference == pytest.approx(sum(x["strict"] for x in lists[1]) / len(lists[1]) - a["accuracy"]["strict"]["value"])
    assert discordant_pairs(dict(zip(("full SFT", "LoRA"), lists))) == []
    if key:
        with pytest.raises(ValueError, match=key): pair_answers(*lists)
        with pytest.raises(ValueError, match=key): read_pair(a["name"], b["name"], folder)


def test_comparable_ones_are_compared(folder):
    a, b = full(folder), lora(folder)
    lists = [read_predictions(e, a["file"].parent) for e in (a, b)]
    assert compare(a, b, folder=a["file"].parent).n == compare(*lists).n == 500 and len(discordant_pairs(dict(zip("ab", lists)))) == 1
    assert compare(list(lists[0]), list(lists[1])).difference == compare(*lists).difference, "plain lists have no facts"
    assert Predictions(lists[0]).facts == {}


@pytest.mark.parametrize("key", ["grader", "data_fingerprint", "max_new_tokens"])
def test_a_study_s_pair_becomes_a_bare_difference(folder, key):
    a, b = full(folder), changed(folder, key)
    row = _pair({"full_main": [a], "lora_main": [b]}, "full_main", "lora_main", "strict", {})
    assert "low" not in row and not row["shown"] and key.replace("data_fingerprint", "data of main") in row["sentence"]
    assert "low" in _pair({"full_main": [a], "lora_main": [a]}, "full_main", "lora_main", "strict", {})


def test_a_summary_gives_the_difference_alone_and_says_why(folder, monkeypatch):
    from gsm8k_sft.reporting import curves
    name = lora(folder)["configuration"]["run_name"]
    runs = [{"preset": "toy", "run_name": name, "tuning_method": "lora", "dataset": "main", "status": "complete"}]
    monkeypatch.setattr(curves, "read_runs", lambda *args: runs)
    monkeypatch.setattr(curves, "_log_columns", lambda r: {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = summary_table("toy", folder).iloc[0]
    changed(folder, "max_new_tokens")
    with pytest.warns(UserWarning, match="max_new_tokens: 192 and 16"): bare = summary_table("toy", folder).iloc[0]
    assert whole.difference_low < whole.difference < whole.difference_high and bare.difference == whole.difference
    assert bare[["difference_low", "difference_high", "p"]].isna().all()


def test_answers_of_two_graders_are_in_no_table_together(folder):
    new = full(folder)
    save(folder, {k: v for k, v in new.items() if k != "file"} | {"protocol": new["protocol"] | {"grader": grader_versions()}},
         read_predictions(new, new["file"].parent))
    changed(folder, "grader")
    names = {e["name"] for e in read_evaluations("toy", folder) if e["protocol"]["grader"] == grader_versions()}
    with pytest.warns(UserWarning, match="left out, as older graders graded them.*__lora__"): table = comparison_table("toy", folder)
    assert "lora" not in set(table.dropna(subset="strict").model) and len(table.dropna(subset="strict")) == len(names)
    with pytest.warns(UserWarning, match="left out"): assert not any(n.startswith("LoRA") for n in read_answers("toy", root=folder))
    assert for_one_table([new]) == [new] and for_one_table([]) == []


def test_probes_are_in_no_table(folder):
    e, before = lora(folder), comparison_table("toy", folder)
    probe = {k: v for k, v in e.items() if k != "file"} | {"name": e["name"].replace("__lora__", "__lora-16new__"), "differs": ["16new"]}
    save(folder, probe, read_predictions(e, e["file"].parent))
    assert comparison_table("toy", folder).equals(before) and len(read_evaluations("toy", folder)) == 4
    assert list(read_answers("toy", root=folder)) == ["base, zero-shot", "full SFT", "LoRA"]
    e["file"].unlink()
    assert len(comparison_table("toy", folder)) == len(before), "without the result of the preset's own protocol, the nearest stands there"


def test_two_prompts_of_a_base_model_are_not_two_seeds(folder):
    e = next(e for e in read_evaluations("toy", folder) if e["model_type"] == "base-0shot")
    plain = {k: v for k, v in e.items() if k != "file"} | {"name": e["name"].replace("base-0shot", "base-0shot-plain")}
    plain["protocol"] = plain["protocol"] | {"prompt_style": "plain"}
    save(folder, plain, read_predictions(e, e["file"].parent))
    means = average_seeds(comparison_table("toy", folder))
    assert means[means.model == "base-0shot"][["experiment", "seeds"]].values.tolist() == [["", 1], ["plain", 1]]


def versions(right, k=8, field=None):
    "Predictions of k versions of each problem, all answered as it is"
    return [{"id": f"{i}/{j}", **({field: f"problem {i}"} if field else {}), **dict.fromkeys(GRADERS, bool(x))}
            for i, x in enumerate(right) for j in range(k)]

@pytest.fixture
def right(): # (runs, problems)
    return np.random.default_rng(3).random((4, 60)) < np.array([[0.35], [0.35], [0.6], [0.6]])

@pytest.mark.parametrize("field", CLUSTERS)
def test_copies_of_a_problem_prove_no_more_than_it(right, field):
    "Eight versions answered alike: intervals and p are those of the problem itself; without the field they are too narrow"
    once, copies, blind = ([versions(r, *of) for r in right] for of in ((1,), (8, field), (8,)))
    a, b = (compare_seeds(runs[:2], runs[2:]) for runs in (once, copies))
    assert (b.low, b.high, b.p, b.detectable) == pytest.approx((a.low, a.high, a.p, a.detectable)) and a.equivalence == b.equivalence
    assert (b.n, b.clusters, a.clusters) == (480, 60, 0) and "seeds and 60 clusters" in str(b)
    one, wide, blind = (compare(runs[0], runs[2]) for runs in (once, copies, blind))
    reference = mean_difference(*right[[0, 2]].astype(float)).interval()
    assert (wide.low, wide.high) == pytest.approx(reference, abs=0.01) and wide.method == "60 clusters" and "McNemar" not in str(wide)
    assert wide.p == pytest.approx(one.p, abs=0.02) and blind.p < 0.1 * wide.p
    assert blind.high - blind.low < 0.5 * (wide.high - wide.low)
    low, high = ([accuracies(runs[0])["strict"][k] for runs in (once, copies)] for k in ("low", "high"))
    assert low[1] == pytest.approx(low[0], abs=0.03) and high[1] == pytest.approx(high[0], abs=0.03)

def test_clusters_of_unequal_size_against_a_simulation():
    "Of 400 studies with 40 clusters of 1 to 15 problems, 95 % intervals hold the true accuracy in 92 to 98 %"
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        shares, sizes = rng.beta(2, 3, 40), rng.integers(1, 16, 40)
        rows = [{"id": f"{i}/{j}", "template": f"t{i}", **dict.fromkeys(GRADERS, bool(rng.random() < p))}
                for i, (p, n) in enumerate(zip(shares, sizes)) for j in range(n)]
        found = accuracies(rows)["strict"]
        held += found["low"] <= 0.4 <= found["high"]
    assert 368 <= held <= 392

def test_each_cluster_counts_the_same(right):
    "Clusters of one to five problems: the difference is that of the clusters' means, and lies in the middle of its interval"
    runs = [[r for r in versions(x, 5, "template") if int(r["id"].split("/")[1]) <= int(r["id"].split("/")[0]) % 5] for x in right]
    means = right.mean(axis=1)
    for found, a, b in ((compare(runs[0], runs[2]), means[0], means[2]),
                        (compare_seeds(runs[:2], runs[2:]), means[:2].mean(), means[2:].mean())):
        assert found.difference == pytest.approx(b - a) and (found.low + found.high) / 2 == pytest.approx(b - a) and found.n == 180

def test_one_cluster_and_answers_all_alike(right):
    one = [r | {"template": "t"} for r in versions(right[0])]
    assert accuracies(one)["strict"]["low"] == 0 and accuracies(one)["strict"]["high"] == 1
    with pytest.raises(NotComparable, match="all 480 problems were made from one, t"): compare(one, one)
    assert "no interval, since all 480" in str(compare_seeds([one], [one[::-1]], bare=True))
    none = versions(right[0] & False, field="template")
    assert accuracies(none)["strict"]["high"] == accuracies(versions(right[0] & False, 1))["strict"]["high"]
    each = [r | {"template": r["id"]} for r in versions(right[0])] # nothing is shared
    assert accuracies(each) == accuracies(versions(right[0])) and "McNemar" in str(compare(each, each))
