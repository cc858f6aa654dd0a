"Perturbed problems: right answers, the same for the same seed; and the whole study of robustness with the toy"
import json, re, sys
import numpy as np, pandas as pd, pytest
from gsm8k_sft.core.config import fingerprint
from gsm8k_sft.data import symbolic
from gsm8k_sft.data.problems import DataError
from gsm8k_sft.data.symbolic import check_solution, draw_templates, solution_steps
from gsm8k_sft.data.synthetic import make_rows
from gsm8k_sft.experiments.robustness import drop_table, gap_table, study_answers, robustness_sentences, version_sets
from gsm8k_sft.experiments.runner import collect, do_job
from gsm8k_sft.experiments.study import open_jobs, read_study
from gsm8k_sft.report import make_report
from gsm8k_sft.statistics.transfer import gain_gap


# Right answers

@pytest.mark.parametrize("text, steps", [
    ("630 onions / 9 onions/minute = 70 minutes", [("630/9", "70")]),
    ("He pays 3 kgs x $1,200/kg = $3,600", [("3*1,200", "3,600")]),
    ("3 eggs + 4 eggs = 7 eggs, so 7*2=14=2*7 in all", [("3+4", "7"), ("7*2", "14")]),
    ("half * 144 ants = 72", []), ("2x+110=196 and x + 5 + 6 = 20", []), ("Ann = 302 points", []), ("no sum here", []),
    ("2(83+81) = 328", [("2*(83+81)", "328")]), ("9÷3/4=12", [("9÷(3/4)", "12")]),
    ("20% of them: 350/1400*100% = 25%", [("350/1400*100%", "25%")])])
def test_steps_of_a_solution(text, steps):
    assert [(a.replace(" ", ""), b) for a, b in solution_steps(text)] == steps


@pytest.mark.parametrize("solution, answer, wrong", [
    ("5+6 = 11\n#### 11", "11", ""), ("5+6 = 11\n#### 11.0", "11", ""), ("5*1,000 = 5,000 in all\n#### 5000", "5000", ""),
    ("250 / 20 = 12 pans\n#### 12", "12", "a step is wrong: 250 / 20 = 12"),
    ("1/3 = 0.33 and 0.33*3 = 1\n#### 1", "1", "a step is wrong: 1/3 = 0.33"),
    ("5+6 = 11\n#### 12", "12", "no step ends in the answer"), ("5+6 = 11\n#### 11", "12", "the answer isn't the number after ####"),
    ("5-6 = -1\n#### -1", "-1", "the answer is no whole number"), ("5/2 = 2.5\n#### 2.5", "2.5", "the answer is no whole number"),
    ("5+6 = 11", "11", "the answer isn't the number after ####")])
def test_a_solution_is_recalculated(solution, answer, wrong):
    assert check_solution(solution, answer) == wrong


def test_without_reasoning_gym_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match=r"pip install 'gsm8k_sft\[symbolic\]', or make the problems elsewhere .*--out"): draw_templates(1)


def test_generators_that_fail_are_left_out_with_the_reason(monkeypatch):
    "Stand-ins for upstream's functions: one right, one that rounds down now and then, one that always does, one without another question"
    def made(total, parts, name):
        solution = f"Each gets {total} nuts / {parts} friends = {total // parts} nuts\n#### {total // parts}.0"
        return {"question": f"{name} shares {total} nuts among {parts}.", "answer": str(total // parts),
                "metadata": {"answer_cot": solution}}
    good = {0: lambda rng: made(7 * rng.randint(1, 999), 7, "Ann"), 1: lambda rng: made(rng.randint(1, 999), 2, "Ben"),
            2: lambda rng: made(7 * rng.randint(1, 999) + 1, 7, "Cy"), 3: lambda rng: made(14, 7, "Di"),
            14: lambda rng: made(14, 7, "Ed"), 4: lambda rng: made(14, 7, "Flo")}
    def fails(rng): raise ValueError("no numbers fit")
    monkeypatch.setattr(symbolic, "_generators", lambda: ({**good, 5: fails}, [4]))
    rows, lines = draw_templates(10)
    why = {line["template"]: line["why"] for line in lines}
    assert {k for k, w in why.items() if not w} == {0, 1} and [r["template"] for r in rows] == ["0"] * 10 + ["1"] * 10
    assert why[2].startswith("0 good ones of 40; a step is wrong: ") and why[3] == "1 good ones of 40; the others are the same questions"
    assert why[4] == "upstream says that it needs a fix" and "no numbers fit" in why[5] and why[14].startswith("a word is missing")
    assert all(r["answer"].endswith(f"#### {int(r['question'].split()[2]) // (7 if r['template'] == '0' else 2)}") for r in rows)
    assert {r["original"] for r in rows} == {"test/989", "test/930"} and all(r["steps"] == 1 and r["largest"] > 1 for r in rows)
    assert rows == draw_templates(10)[0] != draw_templates(10, seed=1)[0] and len({r["question"] for r in rows}) == 20


def test_the_instances_are_the_same_as_ever():
    pytest.importorskip("reasoning_gym", "0.1.19", exc_type=ImportError)
    rows, lines = draw_templates()
    assert (len(rows), fingerprint(rows)) == (3950, "137f8fb1fe96a82f") and len({r["question"] for r in rows}) == 3950
    assert sum(not line["why"] for line in lines) == 79 and len(lines) == 100


# Statistics

def test_the_gap_is_a_difference_of_differences():
    rng = np.random.default_rng(3)
    a, b = [tuple(rng.random((seeds, 30)) for _ in range(2)) for seeds in (1, 3)]
    e = gain_gap(a, b, fixed="a")
    by_hand = (b[1].mean() - a[1].mean()) - (b[0].mean() - a[0].mean())
    assert e.difference == pytest.approx(by_hand) and e.error > 0
    assert gain_gap(b, a, fixed="b").difference == pytest.approx(-by_hand) and gain_gap(b, a, fixed="b").error == pytest.approx(e.error)
    assert gain_gap((a[0], a[0]), (b[0], b[0]), fixed="a").difference == 0
    with pytest.raises(ValueError, match="30 and 29 groups"): gain_gap(a, tuple(x[:, 1:] for x in b))
    with pytest.raises(ValueError, match="a number of each"): gain_gap(a, (b[0], b[1] * np.nan))


def test_the_gap_s_interval_holds_the_truth():
    "Sixty templates whose versions are answered alike: independence of the versions would make intervals far too short"
    rng, found = np.random.default_rng(5), []
    for _ in range(300):
        skill = rng.normal(0.4, 0.1, (2, 60)).clip(0, 1) # the template's own share, before and after tuning
        arms = [(rng.random((n, 60)) < p, rng.binomial(20, p, (n, 60)) / 20) for n, p in zip((1, 3), skill)]
        found.append(gain_gap(*[(o.astype(float), v) for o, v in arms], fixed="a").interval())
    covered = np.mean([low <= 0 <= high for low, high in found])
    assert 0.91 <= covered <= 0.99


# The whole study

ROBUST = """
preset: toy
overrides: [data.train_samples=24, data.test_samples=8, data.validation_fraction=0.01, train.max_steps=3, train.eval_steps=0,
            train.validation_samples=0, evaluation.max_new_tokens=24]
methods: {full: {tuning: full, learning_rates: [1.0e-5]}, lora: {tuning: lora, learning_rates: [1.0e-5]}}
runs:
  full: {method: full, seeds: [0, 1], ask: ["evaluation.datasets=[main,symbolic,gsm_plus,gsm_plus_unanswerable,svamp]",
                                            "evaluation.calculator=true evaluation.datasets=[main,symbolic]"]}
  lora: {method: lora, seeds: [0], ask: ["evaluation.datasets=[main,symbolic,gsm_plus,gsm_plus_unanswerable,svamp]"]}
base: [{shots: [0], overrides: ["evaluation.datasets=[main,symbolic,gsm_plus,gsm_plus_unanswerable,svamp]"]}]
pairs: [[base, full_main], [base, lora_main], [lora_main, full_main]]
"""


def write_sets(folder):
    "The published layouts, with problems that the toy can read: `symbolic`, GSM-Plus, SVAMP"
    problems = make_rows("test", n=40)
    versions = [{**problems[8 + 2 * i + j], "template": str(i), "original": f"test/{i}", "steps": 2 + 3 * j, "largest": 10.0 * 9 ** j,
                 "original_largest": 10.0} for i in range(4) for j in range(2)]
    kinds = ["numerical substitution"] * 6 + ["distraction insertion"] * 2
    plus = [{"question": p["question"], "solution": p["answer"], "answer": p["answer"].rpartition("#### ")[2], "perturbation_type": kind,
             "seed_question": problems[i]["question"] if i else "no test problem, Zoë’s"}
            for i, (p, kind) in enumerate(zip(problems[20:], kinds))]
    plus += [{**p, "question": f"{p['question']} Who knows, José?", "solution": "It can't be known.\n#### None", "answer": "None",
              "perturbation_type": "critical thinking"} for p in plus]
    svamp = [{"Body": "Ann had 3 pens.", "Question": f"She got {i}. How many?", "Equation": f"( 3.0 + {i}.0 )", "Answer": 3.0 + i,
              "Type": "Addition"} for i in range(2, 10)]
    for name, rows in (("symbolic/test.jsonl", versions), ("gsm_plus/gsmplus_testmini.jsonl", plus), ("svamp/SVAMP.json", svamp)):
        (path := folder / name).parent.mkdir(parents=True)
        path.write_text(json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(r) + "\n" for r in rows))


def made_up(model, right):
    "For each seed and problem: is the original right, and how many of ten versions"
    rows = [{"set": s, "model": model, "seed": k, "calculator": False, "id": f"test/{i}" if s == "main" else f"test/{i}-{j}",
             "numeric": j < n, "original": None if s == "main" else f"test/{i}", "steps": "2", "largest": "10",
             "original_largest": str(4 + 5 * i),
             "perturbation_type": None}
            for k, problems in enumerate(right) for i, (original, versions) in enumerate(problems)
            for s, n, of in (("main", original, 1), ("symbolic", versions, 10)) for j in range(of)]
    return pd.DataFrame(rows)


def test_gains_and_their_gap_by_hand(tmp_path):
    "Originals in another order than versions would give other numbers"
    base, full, lora = [[(0, 1), (1, 9), (0, 0)]], [[(1, 5), (1, 9), (0, 4)], [(1, 3), (1, 9), (1, 0)]], [[(1, 1), (0, 9), (0, 1)]] * 2
    table = pd.concat([made_up(*x) for x in (("base", base), ("full", full), ("lora", lora))]).sample(frac=1, random_state=0)
    (path := tmp_path / "study.yaml").write_text(
        "preset: toy\nmethods: {full: {tuning: full, learning_rates: [1]}, lora: {tuning: lora, learning_rates: [1]}}\n"
        "runs: {full: {method: full}, lora: {method: lora}}\npairs: [[base, full_main], [lora_main, full_main]]\n")
    gaps = gap_table(read_study(str(path)), table).set_index(["versions", "a"])
    untuned = gaps.loc[("other names and numbers", "base")] # gains: (5/6 - 1/3) on originals, (30/60 - 10/30) on versions
    assert (untuned["gain on originals"], untuned["gain on versions"], untuned["gap"]) == (50.0, 16.7, -33.3)
    assert gaps.loc[("other names and numbers", "lora"), "gap"] == -36.7 # (30/60 - 22/60) - (5/6 - 1/3)
    matched = drop_table(table).set_index(["versions", "model"]).loc[("matched in size", "full")] # 10 against 9 and 14: problems 1 and 2
    assert (matched.originals, matched["on originals"], matched["on versions"]) == (2, 75.0, 55.0)
    assert gaps["p, Holm"].notna().tolist() == [True, True] + [False] * (len(gaps) - 2)


@pytest.mark.slow # quick: the chapter reads such a study, test_study does a whole one, test_datasets asks several sets
def test_the_study_of_robustness_from_training_to_its_sentences(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_sets(tmp_path / "data")
    (tmp_path / "configs" / "robustness").mkdir(parents=True)
    (tmp_path / "configs" / "robustness" / "toy.yaml").write_text(ROBUST)
    study = read_study("robustness/toy")
    assert study.archive == "robustness/toy" and robustness_sentences(study) == [] and len(study_answers(study)) == 0
    while jobs := open_jobs(study)[0]:
        for job in jobs: do_job(job)
    collect(study)
    assert not open_jobs(study)[0] and (tmp_path / "results" / "robustness" / "toy" / "answers.parquet").exists()
    table = study_answers(study)
    counts = table[~table.calculator].groupby(["set", "model"]).size().unstack("model").T.to_dict()
    assert counts == {"main": {"base": 8, "full": 16, "lora": 8}, "symbolic": {"base": 8, "full": 16, "lora": 8},
                      "gsm_plus": {"base": 8, "full": 16, "lora": 8}, "gsm_plus_unanswerable": {"base": 8, "full": 16, "lora": 8},
                      "svamp": {"base": 8, "full": 16, "lora": 8}}
    sizes = {name: part.id.nunique() for name, part in version_sets(table).items()}
    assert sizes == {"other names and numbers": 8, "GSM-Plus": 7, "matched in size": 4, "larger numbers": 4, "up to 3 steps": 4,
                     "4 steps and more": 4, "distraction insertion": 2, "numerical substitution": 5}, "an unknown seed question is left out"
    gaps = gap_table(study, table)
    assert gaps["p, Holm"].notna().sum() == 6 and (gaps.low <= gaps.gap).all() and (gaps.gap <= gaps.high).all()
    assert set(gap_table(study, table, calculator=True).b) == {"full"}
    said = robustness_sentences(study)
    assert len(said) == 6 and all(re.search(r"\[[-+]\d+\.\d, [-+]\d+\.\d\]", line) for line in said)
    text = make_report(tmp_path / "report").read_text()
    assert "## Robustness: toy" in text and all(line in text for line in said) and "toy-robustness.png" in text
