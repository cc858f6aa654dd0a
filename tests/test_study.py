"A study from its first search to its tables: workers, interruption, failure, what is kept"
import json
import math
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
import pytest
from gsm8k_sft.core.config import ConfigError, choices, load_config
from gsm8k_sft.core.runs import read_json, write_json
from gsm8k_sft.data.datasets import load_gsm8k
from gsm8k_sft.evaluation.archive import archived_files, glob_files, read_record, unpack
from gsm8k_sft.experiments.runner import collect, main, run_notebook, run_study, skip_kept
from gsm8k_sft.experiments.study import (
    Job, Setting, check_jobs, choose_rate, chosen_setting, open_jobs, read_study, result_names, run_jobs, search_job, search_state)
from gsm8k_sft.experiments.tables import (
    choice_table, contamination_table, forgetting_table, headline_table, missing_jobs, outcome_table, pair_table,
    split_table)
from gsm8k_sft.reporting.curves import plot_rates

STUDY = """
preset: toy
overrides:
  [data.train_samples={train}, data.test_samples=12, data.validation_fraction=0.02, train.num_train_epochs={epochs}, train.eval_steps=0,
   train.validation_samples=0, train.logging_steps=5, evaluation.max_new_tokens=16, evaluation.other_texts=2]
methods:
  full: {{tuning: full, learning_rates: [1.0e-3]}}
  {more}
runs:
  full: {{method: full, datasets: [main, socratic], seeds: [0, 1], ask: ["", evaluation.calculator=true]}}
  full-wd: {{method: full, overrides: [train.weight_decay=0.1]}}
base: [{{shots: [0]}}, {{shots: [0, 1], overrides: [data.prompt_style=plain]}}, {{shots: [0], split: validation}}]
pairs: [[base, full_main], [full_main, full_socratic], [full_main, full-wd_main]]
"""


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    for name in ("runs", "eval_results"): monkeypatch.setenv(f"GSM8K_SFT_PATHS_{name.upper()}", str(tmp_path / name))


def study(folder, train=24, epochs=1, more=""):
    Path(folder).mkdir(exist_ok=True)
    (path := Path(folder) / "small.yaml").write_text(STUDY.format(train=train, epochs=epochs, more=more))
    return read_study(str(path))


def train_anew(names, folder):
    "As if these evaluations had been made after another training of their run"
    for name in names:
        e = read_json(folder / f"{name}.json")
        e["protocol"]["model_fingerprint"] = "anew"
        write_json(folder / f"{name}.json", e)


def check_that_trainings_do_not_mix(small, kept, tmp_path, capsys):
    "A run trained anew under its name replaces what is kept of a job whole, or not at all; `kept` has the whole study"
    job = run_jobs(small, "full", Setting(1e-3))[0]
    names, results, run = result_names(job), tmp_path / "eval_results", tmp_path / "runs" / "toy" / job.name
    before, bytes_before = archived_files(kept), {p.name: p.read_bytes() for p in kept.iterdir()}
    def stays():
        capsys.readouterr(), collect(small, kept)
        said = capsys.readouterr().out
        return said.startswith(f"{job.name} test: trained anew") and {p.name: p.read_bytes() for p in kept.iterdir()} == bytes_before
    write_json(run / "record.json", read_json(run / "record.json") | {"steps": -1})
    train_anew(names[:1], results)
    assert len(names) == 2 and stays(), "the other evaluation is of the training before"
    first = tmp_path / "first" / "toy"
    assert {*collect(small, first)} & {*names} == set() and not glob_files(first, f"eval/{names[0]}*"), "nor where nothing is kept yet"
    (results / f"{names[1]}.json").rename(tmp_path / "away")
    assert stays(), "the other evaluation isn't here"
    (tmp_path / "away").rename(results / f"{names[1]}.json"), train_anew(names[1:], results)
    run.rename(tmp_path / "run")
    assert stays(), "the run isn't here"
    (tmp_path / "run").rename(run)
    whole = read_json(run / "record.json")
    write_json(run / "record.json", whole | {"status": "running"})
    assert stays(), "the run is being trained once more"
    write_json(run / "record.json", whole), collect(small, kept)
    after = archived_files(kept)
    assert before.keys() == after.keys()
    new = {f"{job.name}/record.json", *(f"eval/{name}.json" for name in names)}
    assert {path for path in after if after[path] != before[path]} == new, "other jobs, and the search of the same run, stay"
    assert read_record(kept / job.name / "record.json")["steps"] == -1
    assert {read_record(kept / "eval" / f"{name}.json")["protocol"]["model_fingerprint"] for name in names} == {"anew"}


def test_whole_study_and_what_is_kept(tmp_path, capsys):
    said, small, kept = [], study(tmp_path), tmp_path / "results" / "toy"
    found = run_study(small, say=said.append)
    assert (found["failed"], found["left"], found["waiting"]) == ({}, [], 0)
    assert found["done"] == len(said) == 9, "a search, four runs, an ablation, the base model with and without template, and on validation"
    assert run_study(small)["done"] == 0, "nothing is done twice"
    record = read_json(tmp_path / "runs" / "toy" / "full_main-lr1e-3-s0" / "record.json")
    assert record["lanes"] == 1 and record["status"] == "complete"
    collect(small, kept)
    assert missing_jobs(small, tmp_path / "results") == []
    assert sorted(p.name for p in kept.iterdir()) == ["answers.parquet", "logs.parquet", "records.jsonl"]
    assert [p.parent.name for p in glob_files(kept / "ablations", "*/record.json")] == ["full-wd_main-lr1e-3-s0"]
    verdicts = sorted(p.name.split("__")[0].removeprefix("toy-full_") for p in glob_files(kept, "eval/*.verdicts.jsonl"))
    assert verdicts == [f"{d}-lr1e-3-s{s}" for d in ("main", "socratic") for s in (0, 1, 1)], "other seeds, and the calculator's"
    assert choice_table(small, tmp_path / "results").chosen.tolist() == ["yes"]
    table = outcome_table(small, tmp_path / "results").set_index("experiment")
    untuned = dict.fromkeys(("base-0shot", "base-0shot-plain", "base-1shot-plain"), "–")
    assert table.seeds.to_dict() == {"full_main": 2, "full_socratic": 2, "full-wd_main": 1} | untuned
    pairs = pair_table(small, tmp_path / "results")
    assert pairs.grader.tolist() == ["strict", "numeric", "flexible", "strict", "strict"]
    seeds = ["1 and 2"] * 3 + ["2 and 2", "2 and 1"]
    assert pairs.seeds.tolist() == seeds, "verdicts stand in for predictions; socratic's problems are main's"
    assert "spread between seeds of" not in pairs.sentence[0], "an untuned model has no seeds"
    assert "spread between seeds of full-wd_main" in pairs.sentence[4] and "few runs" in pairs.sentence[4]
    assert (pairs["p, Holm"] >= pairs.p - 1e-12).all() and pairs.sentence.str.contains("within ±2 points").all()
    both = split_table(small, tmp_path / "results").set_index("evaluated")
    validation = read_record(glob_files(kept, "lr_search/validation/toy__validation*__base-0shot-16new__*.json")[0])
    assert list(both.index) == ["full_main-lr1e-3-s0", "base-0shot"]
    assert both.validation["base-0shot"] == round(100 * validation["accuracy"]["numeric"]["value"], 1)
    assert headline_table(tmp_path / "results").empty, "no study of ours"
    lost = forgetting_table(small, tmp_path / "results").set_index(["a", "b"])
    from_base, from_full = ("full_main", "full_socratic", "full-wd_main"), ("full_socratic", "full-wd_main")
    assert list(lost.index) == [*(("base", name) for name in from_base), *(("full_main", name) for name in from_full)]
    def losses(name):
        files = [p for p in glob_files(kept, f"eval/toy{name}*.json") if "calculator" not in p.name]
        return [read_record(p)["elsewhere"]["code"] for p in files]
    mean = sum(map(sum, losses("-full_main"))) / 4 - sum(losses("__test*base-0shot-16new_")[0]) / 2
    assert lost.code["base", "full_main"].startswith(f"{mean:+.3f} ["), "two seeds, two texts"
    check_that_trainings_do_not_mix(small, kept, tmp_path, capsys)
    for name in ("runs", "eval_results"): shutil.rmtree(tmp_path / name)
    assert len(open_jobs(small)[0]) == 4
    assert open_jobs(small, skip_kept(small, tmp_path / "results")) == ([], 0), "a fresh clone with results/ has nothing left to do"
    unpack(kept, tmp_path / "less" / "toy")
    for path in (tmp_path / "less").glob("toy/eval/*main-lr1e-3-s1__test*__full-16new__*"): path.unlink()
    assert [j.name for j in open_jobs(small, skip_kept(small, tmp_path / "less"))[0]] == ["full_main-lr1e-3-s1"]
    assert missing_jobs(small, tmp_path / "less") == ["full_main-lr1e-3-s1 (full-16new)"], "folders are read as an archive is"


def drive(skill, given, limit=3):
    "Try what `choose_rate` asks for until it asks for nothing more"
    right = {}
    while True:
        rate, rates = choose_rate(right, given, limit)
        if not (new := [r for r in rates if r not in right]): return rate, rates
        right |= {r: skill(r) for r in new}


@pytest.mark.parametrize("steps", range(-6, 7))
def test_a_list_grows_by_factors_of_two_until_its_best_rate_is_inside(steps):
    given, top = [1e-4, 2.5e-4, 5e-4], 2.5e-4 * 2.0 ** steps
    rate, rates = drive(lambda r: -abs(math.log(r / top)), given)
    if rate is None: assert len(rates) == 6 and abs(steps) > 3, "three steps out and still at an end"
    else:
        i = rates.index(rate)
        assert 0 < i < len(rates) - 1 and abs(math.log2(rate / top)) <= 0.5 + 1e-9
    assert all(r in rates for r in given) and len(rates) <= 6
    assert drive(lambda r: -r, given, limit=0) == (None, given) and drive(lambda r: r, [1e-4]) == (1e-4, [1e-4])


def test_a_test_set_is_read_once_for_all_jobs_of_a_study(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("gsm8k_sft.experiments.study.load_gsm8k", lambda *asked: read.append(1) or load_gsm8k(*asked))
    jobs = run_jobs(study(tmp_path, train=31), "full", Setting(1e-3)) # a number of problems that no other test has
    assert len({name for j in jobs for name in result_names(j) if "first12" in name}) == 8 and len(read) == 2, "main and socratic"
    result_names(Job("toy", "plain", None, overrides=("data.test_samples=12", "data.prompt_style=plain", "data.max_length=99"), shots=(0,)))
    assert len(read) == 2, "the same problems"
    study(tmp_path, train=31)
    assert result_names(jobs[0]) and len(read) == 3, "a study that is read anew sees the data of now"


def search(folder, outcomes, bare=(), **keys):
    "A study whose search has these outcomes: rate -> for each seed the problems that were right, of 40; `bare`: rates without answers"
    method = f"lora: {{tuning: lora, learning_rates: [1.0e-3, 2.0e-3, 4.0e-3], {', '.join(f'{k}: {v}' for k, v in keys.items())}}}"
    found = study(folder, more=method)
    (out := Path(folder) / "answers").mkdir(exist_ok=True)
    for rate, seeds in outcomes.items():
        for seed, solved in enumerate(seeds):
            [name] = result_names(search_job(found, "lora", Setting(rate, seed=seed)))
            write_json(out / f"{name}.json", {"accuracy": {"strict": {"value": len(solved) / 40}}, "n": 40})
            rows = [json.dumps({"id": f"main/test/{i}", "strict": i in solved}) for i in range(40)]
            if rate not in bare: (out / f"{name}.predictions.jsonl").write_text("\n".join(rows) + "\n")
    setting, right = chosen_setting(found, "lora", out)
    return setting, {(s.rate, s.seed) for s, n in right.items() if n is None}, search_state(setting, right)


def test_a_second_seed_where_the_first_does_not_decide(tmp_path):
    clear = {1e-3: [range(5)], 2e-3: [range(30)], 4e-3: [range(10)]}
    assert search(tmp_path / "a", clear)[:2] == (Setting(2e-3), set()), "a paired test tells the neighbours apart"
    assert search(tmp_path / "b", clear, bare=[4e-3])[1:] == ({(2e-3, 1), (4e-3, 1)}, "open"), "answers that weren't kept decide nothing"
    near = clear | {4e-3: [range(28)], 8e-3: [range(4)]}
    assert search(tmp_path / "c", near)[1] == {(2e-3, 1), (4e-3, 1)}
    assert search(tmp_path / "d", near, seeds=[0])[:2] == (Setting(2e-3), set())
    moved = {**near, 2e-3: [range(30), range(20)], 4e-3: [range(28), range(27)]}
    setting, missing, _ = search(tmp_path / "e", moved)
    assert (setting, missing) == (Setting(4e-3), set()), "the mean over both seeds decides, and 8e-3 brackets it"


def test_no_choice_without_a_bracket(tmp_path):
    rising = {1e-3 * 2 ** k: [range(5 + 7 * k)] for k in range(4)}
    assert search(tmp_path / "a", rising, extensions=1)[::2] == (None, "not bracketed")
    assert search(tmp_path / "b", rising)[1:] == ({(1.6e-2, 0)}, "open"), "three times, unless the study says otherwise"
    root, found = tmp_path / "results", read_study(str(tmp_path / "a" / "small.yaml"))
    shutil.copytree(tmp_path / "a" / "answers", root / "toy" / "lr_search" / "validation")
    table = choice_table(found, root)
    assert table[table.method == "lora"].chosen.tolist() == ["", "", "", "not bracketed"]
    assert "learning rate of lora (not bracketed)" in missing_jobs(found, root)
    with pytest.raises(ConfigError, match="seeds"): search(tmp_path / "c", {}, seeds=[])
    ax = plot_rates(table[table.method == "lora"], "toy")
    assert len(ax.lines) == len(plot_rates(table[table.method == "lora"].assign(chosen=["", "yes", "", ""])).lines) - 1, "no star"


def test_searches_that_are_kept_were_chosen_inside_their_lists():
    for name in choices("study"):
        table = choice_table(read_study(name))
        table["rate"] = table["learning rate"].str.extract(r"^([\d.]+e-\d+)")[0].astype(float)
        for method, t in table.groupby("method"):
            assert t.rate.min() < t[t.chosen == "yes"].rate.item() < t.rate.max(), f"{name} {method}"


@pytest.mark.slow
def test_what_a_model_knew_before_by_a_command(tmp_path):
    out = tmp_path / "results" / "gemma-3-270m"
    few = "data.train_samples=100 data.test_samples=4"
    command = [sys.executable, "-m", "gsm8k_sft.evaluation.retention", "toy", "--n", "6", "--overrides", few, "--out", str(out)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=150)
    record = read_json(out / "contamination.json")
    assert "nats per token" in said.stdout, said.stderr
    assert (len(record["validation"]), len(record["test"])) == (6, 4) and record["environment"]["packages"]
    row, difference = contamination_table(tmp_path / "results").iloc[0], sum(record["validation"]) / 6 - sum(record["test"]) / 4
    assert (row.model, row.texts) == ("gemma-3-270m", 6) and row["validation - test"].startswith(f"{difference:+.3f} [")
    assert contamination_table(tmp_path).empty


@pytest.mark.parametrize("old,new,why", [
    ("split: validation", "split: train", r"base\[2\]: .*evaluation.split"),
    ("[1.0e-3]", "[.nan, 1.0e-3]", r"methods.full.learning_rates: needs .* not \[nan, 0.001\]"),
    ("[1.0e-3]", "[1.0e-3], epochs: [1, 1.0]", r"methods.full.epochs: .* each once"),
    ("seeds: [0, 1]", "seeds: [5000000000]", r"runs.full: seed: 5000000000 is outside"),
    ("evaluation.calculator=true", "evaluation.samples=2", r"runs.full: evaluation.samples: .* need evaluation.temperature"),
    ("evaluation.calculator=true", "'evaluation.datasets=[none]'", r"runs.full: dataset: 'none' is not one of"),
    ("evaluation.calculator=true", "evaluation.split=validation", r"runs.full: .* the study itself sets"),
    ("train.weight_decay=0.1", "train.learning_rate=0.1", r"runs.full-wd: .* the study itself sets"),
    ("train.weight_decay=0.1", "train.weight_decay=-1", r"runs.full-wd: train.weight_decay: -1.0 is outside"),
    ("data.prompt_style=plain", "data.prompt_stile=plain", r"base\[1\]: .* Did you mean 'data.prompt_style'"),
    ("  full-wd:", "  a:\n    {method: full, tuning: lora}\n  full:", r"duplicate key"),
    ("[full_main, full-wd_main]", "[full_main, full_main]", r"a pair has two experiments"),
    ("methods:\n  full: {", "methods:\n  - {", r"methods: a mapping of keys is needed"),
    ("preset: toy", "preset: toy", None)])
def test_what_cannot_be_is_said_before_the_first_job(tmp_path, old, new, why):
    (path := tmp_path / "bad.yaml").write_text(text := STUDY.format(train=24, epochs=1, more="").replace(old, new))
    assert new in text
    if not why:
        check_jobs(read_study(str(path)))
        return
    with pytest.raises(ConfigError, match=why): check_jobs(read_study(str(path)))
    with pytest.raises(SystemExit, match="ConfigError: "): main(str(path))
    assert not (tmp_path / "runs").exists()


def test_two_trainings_of_one_name_and_pairs_of_what_there_is(tmp_path):
    "A run is found by its name; a run without changes goes by that of its method"
    def read(text):
        (path := tmp_path / "a.yaml").write_text("preset: toy\nmethods: {a: {tuning: full, learning_rates: [1.0e-3]}}\n" + text)
        check_jobs(read_study(str(path)))
    read("runs: {b: {method: a, ask: [evaluation.calculator=true]}, c: {method: a}}\npairs: [[base, a_main]]")
    with pytest.raises(ConfigError, match="pairs: 'b_main' is not one of base, a_main"):
        read("runs: {b: {method: a}}\npairs: [[base, b_main]]")
    with pytest.raises(ConfigError, match="yaml: runs.a: another training of this study is called a_main-lr1e-3-s0 too"):
        read("runs: {a: {method: a, overrides: [train.max_steps=3]}}")


def test_the_untuned_model_asked_in_two_ways_of_one_name(tmp_path):
    (path := tmp_path / "a.yaml").write_text("preset: toy\noverrides: [data.test_samples=2, evaluation.max_new_tokens=4]\n"
                                             "base: [{shots: [0]}, {shots: [1]}]\n")
    assert run_study(read_study(str(path)))["done"] == 2 and len(list((tmp_path / "eval_results").glob("*.json"))) == 2


def test_options_of_a_study_without_one():
    for options in ({"overrides": "train.max_steps=2"}, {"keep": True}, {"rest": True}):
        with pytest.raises(SystemExit, match="go with a study's name"): main(**options)


def test_a_value_with_a_blank_reaches_the_notebook(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("papermill.execute_notebook", lambda *files, parameters, **how: seen.update(parameters))
    job = Job("toy", "full_main-s0", "full", overrides=("one_shot_example.question=Two words?",))
    monkeypatch.setattr("gsm8k_sft.experiments.runner.do_job", lambda job: "")
    run_notebook(job)
    assert load_config("toy", overrides=seen["overrides"], training=False).one_shot_example.question == "Two words?"


def test_the_runner_leaves_torch_to_its_workers():
    "A worker's number of threads is read when torch is imported, and Ray's processes import the runner first"
    code = "import sys, gsm8k_sft.experiments.runner; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.parametrize("change,again", [
    ({}, False), ({"overrides": "evaluation.split=validation"}, False), ({"overrides": None}, True), ({"dataset": "socratic"}, True),
    ({"run": None}, True), ({"exception": True}, True), ({"end_time": None}, True)])
def test_a_notebook_stands_for_another_job_of_its_run_only_where_it_trained_just_that(tmp_path, monkeypatch, change, again):
    "One of somebody else's that papermill wrote has no overrides; a run whose folder is gone has its notebook executed anew"
    job, executed = Job("toy", "full_main-s0", "full", overrides=("train.max_steps=2",)), []
    monkeypatch.setattr("gsm8k_sft.experiments.runner.do_job", lambda job: "")
    def execute(notebook, out, parameters, **how):
        executed.append(out)
        given = {k: v for k, v in parameters.items() if k not in change} | ({"dataset": change["dataset"]} if "dataset" in change else {})
        if change.get("overrides"): given["overrides"] = parameters["overrides"].replace("evaluation.split=test", change["overrides"])
        told = {"end_time": "2026", "exception": False} | {k: v for k, v in change.items() if k in ("end_time", "exception")}
        out.write_text(json.dumps({"metadata": {"papermill": told | {"parameters": given}}}))
        if "run" not in change: write_json(out.with_suffix("") / "record.json", {"status": "complete"})
    monkeypatch.setattr("papermill.execute_notebook", execute)
    run_notebook(job), run_notebook(job)
    assert len(executed) == 1 + again


@pytest.mark.slow
def test_in_notebooks_a_run_is_executed_once_whatever_is_asked_of_it(tmp_path):
    "The search and a run of the same rate are one training: the second job asks the test problems without another notebook"
    one = study(tmp_path)
    one.how, one.base, one.pairs, one.runs["full"].datasets, one.runs["full"].seeds = "notebook", [], [], ["main"], [0]
    del one.runs["full-wd"]
    found = run_study(one)
    assert (found["done"], found["failed"], found["left"]) == (2, {}, [])
    assert [p.name for p in tmp_path.glob("**/runs/toy/*.ipynb")] == ["full_main-lr1e-3-s0.ipynb"]


@pytest.mark.slow
def test_a_failure_is_reported_and_the_rest_goes_on(tmp_path):
    broken = study(tmp_path, more="lora: {tuning: lora, learning_rates: [1.0e-3], overrides: ['lora_config.target_modules=[nothing]']}")
    found = run_study(broken)
    assert list(found["failed"]) == ["lora_main-lr1e-3-s0 validation"] and "nothing" in found["failed"]["lora_main-lr1e-3-s0 validation"]
    assert found["left"] == [] and chosen_setting(broken, "lora") == (None, {Setting(1e-3): None})


def test_time_is_up_before_anything_began(tmp_path):
    found = run_study(study(tmp_path), minutes=1e-6)
    assert (found["done"], found["failed"], len(found["left"]), found["waiting"]) == (0, {}, 4, 5)


def interrupt_when(command, ready, said):
    "Start a command that speaks to a file, and Ctrl-C once `ready` says so"
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) # tests that run in the background of a shell inherit that it is ignored
    with open(said, "a") as out: process = subprocess.Popen(command, stdout=out, stderr=out, preexec_fn=listen)
    while not ready() and process.poll() is None: time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 130, said.read_text()


@pytest.mark.slow # quick: Ctrl-C during an inference, SIGTERM and SIGKILL during a training, and that what is done is not done again
def test_interrupted_and_the_same_command_goes_on(tmp_path):
    small, run = study(tmp_path, train=400, epochs=6), tmp_path / "runs" / "toy" / "full_main-lr1e-3-s0"
    command = [sys.executable, "-u", "-m", "gsm8k_sft.experiments.runner", str(tmp_path / "small.yaml")]
    log, said = run / "log.jsonl", tmp_path / "said"
    steps = lambda: [json.loads(l)["step"] for l in log.read_text().split("\n")[:-1]] if log.exists() else []
    interrupt_when(command, steps, said)
    first = steps()
    assert list(run.glob("checkpoint-*")), said.read_text()
    assert open_jobs(small)[1] == 5, "five runs wait for the learning rate"
    interrupt_when(command, lambda: "going on from" in said.read_text() and len(steps()) > len(first), said)
    assert "going on from" in said.read_text() and steps() == sorted(set(steps())) and len(steps()) > len(first), "no step is done twice"


def test_time_is_up_in_the_middle(tmp_path):
    "The alarm of its end reaches a training: it leaves a checkpoint; this process lives, and its signals are as before"
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGALRM)]
    small, run = study(tmp_path, train=400, epochs=400), tmp_path / "runs" / "toy" / "full_main-lr1e-3-s0"
    def ring():
        while not (run / "log.jsonl").exists() and waits: time.sleep(0.1)
        if waits: signal.raise_signal(signal.SIGALRM)
    waits = [threading.Thread(target=ring)]
    waits[0].start()
    try:
        with pytest.raises(KeyboardInterrupt): run_study(small, minutes=60)
    finally: waits.pop().join()
    assert list(run.glob("checkpoint-*")) and len(open_jobs(small)[0]) == 4
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGALRM)] == before
