"Data sets as entries: other columns, files and places; several in one evaluation; what is wrong with one is a line"
import gzip, json, re
from decimal import Decimal
from pathlib import Path

import pyarrow as pa, pyarrow.parquet as pq, pytest
from omegaconf import OmegaConf

from gsm8k_sft.analysis import plot_comparison
from gsm8k_sft.core.config import (
    CONFIGS, ConfigError, choices, evaluated_datasets, for_dataset, load_config, merge_layer, project_path, read_yaml)
from gsm8k_sft.core.runs import read_config
from gsm8k_sft.data.datasets import data_fingerprint, load_evaluated, load_gsm8k, refuse_test
from gsm8k_sft.data.problems import DataError
from gsm8k_sft.data.contamination import main as audit
from gsm8k_sft.evaluate import evaluate_base, evaluate_run, main, regrade, rescore
from gsm8k_sft.evaluation.archive import add_files, archived_files, evaluation_files
from gsm8k_sft.evaluation.results import EvaluationError, for_one_table, majority, read_evaluations, read_predictions, result_name
from gsm8k_sft.grading.errors import grade_answer
from gsm8k_sft.experiments.study import Job, is_done, job_config, result_names
from gsm8k_sft.grading.answers import grader_versions, same_latex
from gsm8k_sft.reporting.tables import comparison_table, format_table, headline

BRIEF = "train.max_steps=2 train.eval_steps=0 evaluation.max_new_tokens=8 data.test_samples=3"
PLUS = {"question": "Ann has 3 figs and buys 4 more. How many?", "solution": "3+4 = <<3+4=7>>7\n#### 7", "answer": "7",
        "perturbation_type": "digit expansion", "seed_question": "Ann has 1 fig ...", "seed_solution": "", "seed_answer": "2"}
NONE = {**PLUS, "question": "Ann has figs. How many?", "solution": "Nobody knows.\n#### None", "answer": "None",
        "perturbation_type": "critical thinking"}
SVAMP = {"ID": "chal-1", "Body": "A pack costs 7 dollars.", "Question": "What do 2 packs cost?", "Equation": "( 7.0 * 2.0 )",
         "Answer": 14.0, "Type": "Multiplication"}


def jsonl(rows): return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project of its own: settings.ini, `data/` with three sets, one of them the user's"
    for name in ("GSM8K_DIR", "GSM8K_SFT_PATHS_DATA"): monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "settings.ini", "[paths]\nruns = runs\n")
    half = {**PLUS, "question": "And 1/2?", "solution": "#### 1/2", "answer": "1/2"}
    write(tmp_path / "data" / "gsm_plus" / "gsmplus_testmini.jsonl", jsonl([PLUS, NONE, half]))
    write(tmp_path / "data" / "svamp" / "SVAMP.json", json.dumps([SVAMP, {**SVAMP, "Body": "Another costs 1.5.", "Answer": 3.5}]))
    mine = [{"problem": f"What is {i} and {i}?", "steps": f"{i}+{i} = {2 * i}", "result": 2 * i, "level": i % 3} for i in range(40)]
    write(tmp_path / "mine.jsonl", jsonl(mine))
    write(tmp_path / "configs" / "dataset" / "mine.yaml", "data: {source: folder, folder: ., files: {train: mine.jsonl}, "
          "question: problem, answer: steps, final: result, keep: {level: level}, licence: CC0}\n")
    return tmp_path


def test_each_entry_is_complete():
    "Each has a licence, a link where it is published, and its keys are the schema's"
    for name in choices("dataset"):
        cfg = load_config("toy", dataset=name, training=False)
        assert cfg.data.licence and (cfg.data.link or cfg.data.source == "generator"), name


def test_columns_of_other_sets(project):
    plus, none, svamp = (load_gsm8k(load_config("toy", dataset=d, training=False))["test"] for d in
                         ("gsm_plus", "gsm_plus_unanswerable", "svamp"))
    assert plus["id"][:] == ["gsm_plus/test/0", "gsm_plus/test/2"] and plus["final"][:] == ["7", "1/2"]
    assert plus[0]["perturbation_type"] == "digit expansion" and plus[0]["answer"] == PLUS["solution"]
    assert (none["final"][:], none["id"][:]) == (["None"], ["gsm_plus_unanswerable/test/1"])
    assert svamp[0] == {"id": "svamp/test/0", "question": "A pack costs 7 dollars. What do 2 packs cost?",
                        "answer": "( 7.0 * 2.0 )\n#### 14", "final": "14", "Type": "Multiplication"}
    with pytest.raises(DataError, match="a problem of the test split"): refuse_test(svamp)


@pytest.mark.parametrize("layout", ["config", "default", "shards"])
def test_the_hubs_layouts_in_a_folder(project, layout):
    "A cloned repository of the hub is read where it lies, whole or in shards, train and test parts joined"
    folder = project / "data" / "svamp"
    before = load_gsm8k(load_config("toy", dataset="svamp", training=False))["test"]
    rows = json.loads((folder / "SVAMP.json").read_text())
    (folder / "SVAMP.json").unlink()
    place = folder / ("mine" if layout == "config" else "data")
    place.mkdir()
    for part, row in zip(("train", "test"), rows): pq.write_table(pa.Table.from_pylist([row]), place / f"{part}-00000-of-00001.parquet")
    if layout == "shards":
        write(folder / "README.md", "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n"
                                    "  - split: test\n    path: data/test-*\n---\n")
    change = {"config": "data.hub_config=mine", "default": "", "shards": f"data.source=hub data.hub_name={folder}"}[layout]
    after = load_gsm8k(load_config("toy", dataset="svamp", overrides=change, training=False))["test"]
    assert data_fingerprint(after) == data_fingerprint(before)


def test_a_set_of_ones_own_from_one_file(project):
    cfg = load_config("toy", dataset="mine", overrides="data.validation_fraction=0.1")
    data = load_gsm8k(cfg)
    assert {s: len(d) for s, d in data.items()} == {"train": 36, "validation": 4}
    rows = {r["id"]: r for part in data.values() for r in part}
    four = {"id": "mine/train/4", "question": "What is 4 and 4?", "answer": "4+4 = 8\n#### 8", "final": "8", "level": "1"}
    assert rows["mine/train/4"] == four
    with pytest.raises(DataError, match="mine has no test split, only train, validation; .*evaluation.datasets"): load_evaluated(cfg)


def test_a_validation_part_of_its_own(project):
    rows = [json.loads(l) for l in (project / "mine.jsonl").read_text().splitlines()]
    write(project / "held.jsonl", jsonl({**r, "problem": r["problem"] + " Say."} for r in rows[:3]))
    data = load_gsm8k(load_config("toy", dataset="mine", overrides="data.files.validation=held.jsonl"))
    assert {s: len(d) for s, d in data.items()} == {"train": 40, "validation": 3}
    assert data["validation"]["id"][0] == "mine/validation/0"


def test_a_boxed_answer_and_a_generator(project, monkeypatch):
    write(project / "makers.py", 'def rows(split):\n    for i in range(4):\n'
          '        yield {"q": f"{split} {i}?", "a": "So $\\\\boxed{%d}$." % i, "template": i // 2}\n')
    monkeypatch.syspath_prepend(str(project))
    write(project / "configs" / "dataset" / "made.yaml", "data: {source: generator, generator: makers.rows, question: q, answer: a, "
          "final: boxed, keep: {template: template}, trainable: false, licence: own}\n")
    rows = load_gsm8k(load_config("toy", dataset="made", training=False))["test"]
    assert rows["final"][:] == list("0123") and rows["template"][:] == list("0011") and rows[2]["answer"] == "So $\\boxed{2}$.\n#### 2"
    with pytest.raises(DataError, match="made: data.generator makers.none\\(.test.\\) fails with AttributeError"):
        load_gsm8k(load_config("toy", dataset="made", overrides="data.generator=makers.none", training=False))


WRONG = [ # text of the entry, what is said
    ("data: {source: folder, folder: .}", "data.licence: is missing; the file of 'own' must name it"),
    ("data: {source: auto, hub_name: me/mine}", "data.licence: is missing"),
    ("data: {licence: MIT}", "data.dataset: 'own' is your own, so its file must say where it lies"),
    ("data: {folder: ., source: folder, licence: MIT, colums: [a]}", "/configs/dataset/own.yaml: key 'data.colums'"),
    ("data: {folder: ., source: folder, license: MIT}", "key 'data.license'.* Did you mean 'data.licence'?"),
    ("data: {folder: ., source: folder, licence: MIT, files: {tets: a.jsonl}}", "data.files: 'tets' is not one of .*Did you mean 'test'"),
    ("data: {folder: ., source: folder, licence: MIT, keep: {text: level}}", "data.keep: a saved answer has a field 'text' already"),
    ("data: {folder: ., source: folder, licence: MIT, finals: nummer}", "data.finals"),
    ("data: {folder: ., source: folder, licence: MIT, files: {train: mine.jsonl}}",
     "mine.jsonl line 1: the fields 'question', 'answer' are missing; data.question, data.answer can name another of: problem, steps, res"),
    ("data: {folder: ., source: folder, licence: MIT, files: {train: mine.jsonl}, question: problem, answer: steps, final: results}",
     "the field 'results' is missing; data.final can name another of: problem, steps, result, level"),
    ("data: {folder: ., source: folder, licence: MIT, files: {train: mine.jsonl}, question: '{problem} {hint}', answer: steps}",
     "the field 'hint' is missing"),
    ("data: {folder: ., source: folder, licence: MIT, files: {train: mine.jsonl}, question: problem, answer: steps, keep: {k: kind}}",
     "the field 'kind' is missing"),
    ("data: {folder: ., source: folder, licence: MIT, files: {train: none.jsonl}}", "there is neither none.jsonl nor"),
    ("data: {folder: ., source: folder, licence: MIT, files: {train: mine.jsonl}, question: problem, answer: steps, final: boxed}",
     r"line 1: the answer has no \\boxed\{\.\.\.\}"),
    ("data: {folder: ., source: folder, licence: MIT, files: {train: mine.csv}}", "mine.csv: is neither JSONL .* nor parquet; save it"),
    ("data: {folder: ., source: folder, licence: MIT, files: {train: mine.json}}", "mine.json row 0: the fields .* another of: rows"),
    ("data: {mix: {mine: 1}, keep: {level: level}}", "data.keep: a mixture has none of its own; put it into the files of mine"),
    ("data: {mix: {mine: 1}, source: folder, folder: elsewhere}", "data.folder: a mixture has none of its own"),
]


@pytest.mark.parametrize("text, says", WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_a_line(project, text, says):
    write(project / "mine.csv", "problem,steps\na,1\nb,2\n")
    write(project / "mine.json", json.dumps({"rows": [1, 2]}, indent=1))
    write(project / "configs" / "dataset" / "own.yaml", text + "\n")
    with pytest.raises((ConfigError, DataError), match=says) as e: load_gsm8k(load_config("toy", dataset="own"))
    assert "\n" not in str(e.value) or "boxed" in text # a column that is nowhere is said once, a fault of each row for each


def test_a_row_is_named_by_file_and_line(project):
    lines = (project / "mine.jsonl").read_text().splitlines()
    lines[4] = lines[4].replace('"result": 8', '"result": "eight"')
    lines[7] = lines[7].replace('"steps"', '"step"')
    write(project / "mine.jsonl", "\n".join(lines) + "\n")
    with pytest.raises(DataError) as e: load_gsm8k(load_config("toy", dataset="mine"))
    assert re.search(r"mine.jsonl line 5: '#### eight' does not end in a number\n", str(e.value))
    assert "mine.jsonl line 8: the field 'steps' is missing; data.answer can name another of: problem, step, result, level" in str(e.value)


def test_a_column_that_contradicts_the_answer(project):
    write(project / "data" / "gsm_plus" / "gsmplus_testmini.jsonl", jsonl([{**PLUS, "answer": "8"}]))
    with pytest.raises(DataError, match="line 1: the answer ends in '7', but 'answer' says '8'"):
        load_gsm8k(load_config("toy", dataset="gsm_plus", training=False))


def load(text, overrides="", **given):
    "The rows of the entry `own`, which is written first"
    write(Path("configs") / "dataset" / "own.yaml", text + "\n")
    return load_gsm8k(load_config("toy", dataset="own", overrides=overrides, **{"training": False} | given))


OWN = "data: {source: folder, folder: ., licence: own, validation_fraction: 0, files: {train: rows.jsonl}"


def test_the_rows_of_one_file_are_parted_by_a_column(project):
    "With values for each split; without, one sentence says so, where each question would be in both"
    rows = [{"question": f"And {i}?", "answer": f"#### {i}", "part": ("a", "b", "c")[i % 3], "ok": i > 0} for i in range(9)]
    write(project / "data" / "own" / "all.jsonl", jsonl(rows))
    both = "data: {licence: own, validation_fraction: 0, files: {train: all.jsonl, test: all.jsonl}%s}"
    data = load(both % ", only: {ok: [true], train: {part: [a, c]}, test: {part: [b]}}")
    assert {s: d["final"][:] for s, d in data.items()} == {"train": ["2", "3", "5", "6", "8"], "validation": [], "test": ["1", "4", "7"]}
    assert data["test"]["id"][0] == "own/test/1"
    with pytest.raises(DataError, match=r"all.jsonl line 1: test and another split read it; data.only can part them by a column") as e:
        load(both % "")
    assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="data.only.test: b is no list"): load(both % ", only: {test: {part: b}}")
    with pytest.raises(ConfigError, match="data.only.part: {'a': 1} is no list"): load(both % ", only: {part: {a: 1}}")
    with pytest.raises(DataError, match="line 1: the field 'prt' is missing; data.only can name another of: question, answer, part, ok"):
        load(both % ", only: {test: {prt: [b]}}")


@pytest.mark.parametrize("only, says", [("kind: [z]", "kind is 'a' or 'b' there"), ("level: ['1']", "level is 1 there"),
                                        ("kind: [a], level: [2]", "kind is 'a' or 'b', level is 1 there")])
def test_no_row_is_taken(project, only, says):
    "The values that there are, since the entry is wrong and not the file"
    write(project / "rows.jsonl", jsonl({"question": f"{k}?", "answer": "#### 1", "kind": k, "level": 1} for k in "ab"))
    with pytest.raises(DataError, match=f"data.only: no row of train is taken; {says}"): load(OWN + f", only: {{{only}}}}}")
    write(project / "rows.json", "[]")
    with pytest.raises(DataError, match="train: there are no rows"): load(OWN.replace("jsonl", "json") + "}")


GENERATORS = [ # the body of the function, what is said
    ("raise ValueError('no luck')", r"fails with ValueError: no luck \(.*made_0.py:3\)"),
    ("yield {}; json.loads('{')", r"fails with JSONDecodeError: Expecting .* \(.*made_1.py:3\)"),
    ("import nosuch", r"fails with ModuleNotFoundError: No module named 'nosuch' \(.*made_2.py:3\)"),
    ("raise SystemExit", r"fails with SystemExit: \(.*made_3.py:3\)"),
    ("return 3", r"own: data.generator made_4.rows\('train'\) fails with TypeError: 'int' object is not iterable$"),
    ("return []", r"own: data.generator made_5.rows\('train'\) gives no rows$"),
    ("return {'question': ['a']}", "made_6.rows train problem 0: an object with question and answer is needed, not str. Correct the data,"),
    ("return [{'question': 'a', 'answer': 3}]", "made_7.rows train problem 0: the field 'answer' is int, not text")]


@pytest.mark.parametrize("i", range(len(GENERATORS)))
def test_a_generator_that_fails_is_a_line(project, monkeypatch, i):
    "The data set, the call, what was raised and where in the user's file, however deep in a library"
    body, says = GENERATORS[i]
    write(project / f"made_{i}.py", f"import json\ndef rows(split):\n    {body}\n")
    monkeypatch.syspath_prepend(str(project))
    entry = f"data: {{source: generator, generator: made_{i}.rows, splits: {{train: a}}, licence: own}}"
    with pytest.raises(DataError, match=says) as e: load(entry)
    assert "\n" not in str(e.value) and "data.folder" not in str(e.value)


def test_a_generator_that_cannot_be_imported_is_a_line(project, monkeypatch):
    "What a module raises before it has the function, and functions that there aren't"
    monkeypatch.syspath_prepend(str(project))
    write(project / "broken_one.py", "1 / 0\n")
    write(project / "broken_two.py", "def rows(split)\n")
    entry = "data: {source: generator, generator: %s, licence: own}"
    for name, says in (("broken_one.rows", r"ZeroDivisionError: division by zero \(.*broken_one.py:1\)"),
                       ("broken_two.rows", r"SyntaxError: .*broken_two.py, line 1"), ("rows", "ValueError: Empty module name"),
                       ("./none.rows", "TypeError"), ("json.none", "AttributeError")):
        with pytest.raises(DataError, match=says): load(entry % name)


def test_the_folder_of_ones_own_name_is_found(project, monkeypatch):
    "data/<name> without a word, for each source that reads folders; GSM8K's folder is GSM8K's alone"
    monkeypatch.setenv("GSM8K_DIR", str(write(project / "gsm8k" / "train.jsonl", "x").parent))
    for part in ("train", "test"): write(project / "data" / "own" / f"{part}.jsonl", jsonl([{"question": part, "answer": "#### 1"}]))
    for source in ("", "source: auto, ", "source: folder, "):
        assert load(f"data: {{{source}licence: own, validation_fraction: 0}}")["test"]["question"][:] == ["test"]
        assert load_config("toy", dataset="own").data.source == (source or "source: auto, ")[8:-2]
    (project / "data" / "own").rename(project / "data" / "other")
    assert load("data: {licence: own, subfolder: other, validation_fraction: 0}")["train"]["question"][:] == ["train"]
    with pytest.raises(DataError, match="data.source: folder, but nothing names one. .* or put it into .*data/own"):
        load("data: {source: folder, licence: own}")
    with pytest.raises(ConfigError, match="must say where it lies: .* or its files must be in .*data/own"): load("data: {licence: own}")


def test_another_gsm8k_is_not_read_from_the_folder_of_the_published_one(project, monkeypatch):
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(9)]
    for split in ("train", "test"):
        write(project / "gsm8k" / f"{split}.jsonl", jsonl([{**r, "question": split + r["question"]} for r in rows]))
    monkeypatch.setenv("GSM8K_DIR", str(project / "gsm8k"))
    asked = "data.source=auto data.validation_fraction=0"
    assert len(load_gsm8k(load_config("toy", overrides=asked))["test"]) == 9
    with pytest.raises(DataError, match="none/fork .main, train. can't be loaded from the hub"):
        load_gsm8k(load_config("toy", overrides=f"{asked} data.hub_name=none/fork"))


def test_a_generator_that_is_not_named(project):
    with pytest.raises(DataError, match="main: data.generator None.'train'. fails with ValueError: Empty module name"):
        load_gsm8k(load_config("toy", overrides="data.source=generator"))


NUMBERS = [(72, "72"), (72.0, "72"), (0.1, "0.1"), (1e-5, "0.00001"), (1e22, "10000000000000000000000"), (10**40, "1" + 40 * "0"),
           (-2.50, "-2.5"), ("72.00", "72"), (1500, "1500"), (2.5e15 + 0.5, "2500000000000000.5")]


@pytest.mark.parametrize("value, text", NUMBERS)
def test_a_number_is_written_out(project, value, text):
    "As a final answer and within a template: no exponent, no closing zeros"
    write(project / "rows.jsonl", jsonl([{"q": "q", "a": "So.", "n": value}]))
    [row] = load(OWN + ", question: '{q} {n}?', answer: a, final: n}")["train"]
    assert row["final"] == text and row["answer"] == f"So.\n#### {text}"
    assert row["question"] == f"q {value if isinstance(value, str) else text}?"


def test_what_is_no_number(project):
    rows = [{"question": str(i), "answer": "a", "n": v} for i, v in enumerate((float("nan"), float("-inf"), None, True, [3], "3 figs"))]
    write(project / "rows.jsonl", jsonl(rows))
    says = ["line 1: the field 'n' is nan", "line 2: the field 'n' is -inf", "line 3: the field 'n' is NoneType",
            "line 4: the field 'n' is bool", "line 5: the field 'n' is list", "line 6: '#### 3 figs' does not end in a number"]
    with pytest.raises(DataError) as e: load(OWN + ", final: n}")
    for text in says: assert text in str(e.value)
    write(project / "rows.jsonl", jsonl(rows[:2]))
    with pytest.raises(DataError, match="line 2: the field 'n' is -inf"): load(OWN + ", question: '{question} {n}', finals: text}")


def test_numbers_of_parquet_files(project):
    "0.1 in 32 bits, decimals; columns that can't be read are named"
    table = pa.table({"question": ["a"], "answer": ["So."], "half": pa.array([0.1], pa.float32()),
                      "money": pa.array([Decimal("7.50")], pa.decimal128(5, 2)), "far": pa.array([2**62], pa.timestamp("ms"))})
    entry = OWN.replace("rows.jsonl", "rows.parquet")
    pq.write_table(table.drop_columns("far"), "rows.parquet")
    assert [load(entry + f", final: {c}}}")["train"]["final"][0] for c in ("half", "money")] == ["0.1", "7.5"]
    (project / "h").mkdir()
    pq.write_table(table.drop_columns("far"), "h/train.parquet")
    hub = f"data: {{source: hub, hub_name: {project}/h, hub_config: default, splits: {{train: train}}, licence: own, final: half}}"
    assert load(hub)["train"]["final"][:] == ["0.1"]
    pq.write_table(table, "rows.parquet")
    with pytest.raises(DataError, match="rows.parquet: the column 'far' can't be read"): load(entry + ", final: half}")
    bad = pa.ListArray.from_arrays([0, 1], pa.array([b"\xff"]).view(pa.string()))
    pq.write_table(pa.table({"question": ["a"], "answer": ["#### 1"], "notes": bad}), "rows.parquet")
    with pytest.raises(DataError, match="rows.parquet: the column 'notes' can't be read: 'utf-8' codec"): load(entry + "}")


def test_a_final_answer_in_another_notation(project):
    write(project / "rows.jsonl", jsonl({"question": a, "answer": f"#### {a}", "n": n} for a, n in (("72.0", 72), ("1/2", 0.5))))
    assert load(OWN + ", final: n}")["train"]["answer"][:] == ["#### 72.0", "#### 1/2"]
    write(project / "rows.jsonl", jsonl([{"question": "a", "answer": "#### 1/3", "n": 0.33}]))
    with pytest.raises(DataError, match="the answer ends in '1/3', but 'n' says '0.33'"): load(OWN + ", final: n}")
    for key in ("question", "answer"):
        with pytest.raises(DataError, match=f"the field '####' is missing; data.{key} can name another"): load(OWN + f", {key}: '####'}}")


@pytest.mark.parametrize("name", [
    "data/train-00000-of-00001.parquet", "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", "own/train-00000-of-00001-a0.parquet",
    "train.parquet", "train.json", "data/train.jsonl", "TRAIN.JSON", "TRAIN.PARQUET"])
def test_files_are_found_where_people_have_them(project, name):
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(3)]
    path = write(project / name, json.dumps(rows, indent=1)) if "json" in name.lower() else project / name
    path.parent.mkdir(exist_ok=True)
    if path.suffix.lower() == ".parquet": pq.write_table(pa.Table.from_pylist(rows), path)
    files = f"files: {{train: {name}}}" if name.isupper() else "splits: {train: train}"
    assert load(f"data: {{source: folder, folder: ., licence: own, validation_fraction: 0, {files}}}")["train"]["final"][:] == list("012")


@pytest.mark.parametrize("content", [
    gzip.compress(b"{}" * 99, mtime=0), gzip.compress(b"{}" * 99, mtime=0x0a350a0a),
    jsonl([{"question": "a", "answer": "b"}] * 9).encode("utf-16-le"),
    "\n".join(json.dumps({"question": i, "answer": "b"}, indent=1) for i in "abc").encode()],
    ids=["gz", "gz with lines, one of them a number", "UTF-16", "indented"])
def test_a_file_in_another_format_is_said_once(project, content):
    (project / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="rows.jsonl line 1: not ") as e: load(OWN + "}")
    assert "\n" not in str(e.value)


def test_a_turn_of_a_chat_without_words(project):
    "An empty system text is left out; an empty question is one, whatever the system text says"
    def chat(*texts): return {"messages": [{"role": r, "content": t} for r, t in zip(("system", "user", "assistant"), texts)]}
    write(project / "rows.jsonl", jsonl([chat("", "One?", "#### 1"), chat(" ", "Two?", "#### 2"), chat("Say.", "Three?", "#### 3")]))
    assert load(OWN + ", messages: messages}")["train"]["question"][:] == ["One?", "Two?", "Say.\n\nThree?"]
    write(project / "rows.jsonl", jsonl([chat("Say.", " ", "#### 1")]))
    with pytest.raises(DataError, match="line 1: the field 'question' is empty"): load(OWN + ", messages: messages}")


def test_what_is_kept_is_text(project):
    write(project / "rows.jsonl", '{"question": "a", "answer": "#### 1", "level": "\\ud83d", "empty": ""}\n')
    with pytest.raises(DataError, match="line 1: the field 'hard' holds U.D83D at character 1"):
        load(OWN + ", keep: {hard: level, none: empty}}")
    assert load(OWN + ", keep: {none: empty}}")["train"]["none"][:] == [""]


def test_an_entry_that_is_a_link_or_a_folder(project):
    (project / "configs" / "dataset" / "linked.yaml").symlink_to(project / "configs" / "dataset" / "mine.yaml")
    (project / "configs" / "dataset" / "none.yaml").mkdir()
    assert load_gsm8k(load_config("toy", dataset="linked"))["train"]["id"][0].startswith("linked/train/")
    with pytest.raises(ConfigError, match="dataset: 'none' is not one of"): load_config("toy", dataset="none")
    with pytest.raises(ConfigError, match="data.licence: is missing"): load(OWN.replace("licence: own", "licence: ' '") + "}")


def test_a_set_that_is_asked_twice_is_asked_once(project):
    cfg = load_config("toy", overrides="evaluation.datasets=[svamp,main,configs/dataset/mine.yaml,mine,svamp]", training=False)
    assert [c.data.dataset for c in evaluated_datasets(cfg)] == ["svamp", "main", "mine"]


def test_testing_only(project):
    with pytest.raises(ConfigError, match="svamp is for testing only"): load_config("toy", dataset="svamp")
    with pytest.raises(ConfigError, match="Did you mean 'svamp'"): load_config("toy", overrides="evaluation.datasets=[svam]")
    with pytest.raises(DataError, match="svamp has no train split"):
        load_gsm8k(load_config("toy", dataset="svamp", training=False), ["train"])


def test_the_same_as_under_the_sets_own_name(project):
    "Asked by evaluation.datasets or as `dataset`, a base model's evaluation has one configuration and one name"
    cfg = load_config("toy", overrides=f"evaluation.datasets=[main,{CONFIGS}/dataset/svamp.yaml,gsm_plus]", training=False)
    for asked in evaluated_datasets(cfg):
        alone = load_config("toy", dataset=asked.data.dataset, training=False)
        assert asked.data == alone.data and asked.one_shot_example == alone.one_shot_example
        assert result_name(asked, "base-1shot") == result_name(alone, "base-1shot")
    mine = load_config("toy", overrides=["one_shot_example.question=My own?", "data.test_samples=2"], training=False)
    other = for_dataset(mine, "svamp")
    assert (other.one_shot_example.question, other.data.test_samples) == ("My own?", 2)


def test_a_set_is_asked_by_the_path_of_its_file(project):
    write(project / "elsewhere" / "my set.yaml", (project / "configs" / "dataset" / "mine.yaml").read_text())
    cfg = load_config("toy", overrides=["evaluation.datasets=['elsewhere/my set.yaml',mine]", "evaluation.split=validation"])
    assert [(c.data.dataset, len(rows)) for c, rows in load_evaluated(cfg)] == [("my set", 2), ("mine", 2)]
    named = load_config("toy", dataset="elsewhere/my set.yaml", config="elsewhere/my set.yaml", overrides="seed=0")
    assert re.fullmatch("full_my-set-s0-my-set-[0-9a-f]{6}", named.run_name) and load_config("toy", overrides=f"run_name={named.run_name}")
    with pytest.raises(ConfigError, match="run_name: '../x'"): load_config("toy", overrides="run_name=../x evaluation.datasets=[mine]")


def test_gsm8k_stays_where_it_is_for_socratic(project):
    cfg = load_config("toy", overrides="data.source=folder data.folder=data", training=False)
    assert for_dataset(cfg, "socratic").data.folder == "data" and for_dataset(cfg, "svamp").data.folder is None


def test_earlier_runs_know_their_files(project):
    "A configuration of before entries gets its data set's keys"
    for name in ("main", "socratic", "adding"):
        old = merge_layer(load_config("toy", dataset=name if name != "adding" else "main", training=False), {"data": {"dataset": name}}, "")
        whole = OmegaConf.to_container(old)
        whole["data"] = {k: v for k, v in whole["data"].items() if k in (
            "source", "dataset", "hub_name", "hub_revision", "folder", "validation_fraction", "validation_seed", "train_samples",
            "test_samples", "max_length", "prompt_style")}
        del whole["evaluation"]["datasets"]
        path = write(project / name / "config.yaml", OmegaConf.to_yaml(whole))
        cfg = read_config(path)
        own = read_yaml(CONFIGS / "dataset" / f"{name}.yaml").data if name != "adding" else {"licence": "unknown"}
        assert {k: cfg.data[k] for k in own} == dict(own) and list(cfg.evaluation.datasets) == []


def test_no_number_is_right_where_there_is_no_answer():
    gold = "Nobody knows.\n#### None"
    for text, reason, right in (("It can't be said.", "stop", True), ("So #### 7", "stop", False), ("It can't be", "length", False)):
        found = grade_answer(text, gold, reason)
        assert [found[g] for g in ("strict", "numeric", "flexible")] == [right] * 3 and (found["class"] == "right") is right


def test_trained_on_ones_own_and_asked_on_several(project, capsys):
    from gsm8k_sft.analysis import main as compare
    from gsm8k_sft.train import train
    run = train(load_config("toy", "lora", "mine", overrides=f"{BRIEF} evaluation.datasets=[main,gsm_plus,svamp]"))
    names = run["evaluations"]
    assert [n.rsplit("__", 1)[1] for n in names] == ["main", "gsm_plus", "svamp"]
    plus = read_predictions(names[1])
    assert [a["perturbation_type"] for a in plus] == ["digit expansion"] * 2 and "level" not in plus[0]
    folder = project / "runs" / "toy" / run["run_name"]
    apart = evaluate_run(folder, overrides="evaluation.datasets=[gsm_plus_unanswerable]", progress=False)
    assert [(r["dataset"], r["n"]) for r in apart] == [("gsm_plus_unanswerable", 1)]
    cfg = load_config("toy", overrides=f"{BRIEF} evaluation.datasets=[svamp,gsm_plus]", training=False)
    base = evaluate_base(cfg, [0, 2], progress=False)
    assert [(r["model_type"], r["dataset"]) for r in base] == [(f"base-{k}shot", d) for k in (0, 2) for d in ("svamp", "gsm_plus")]
    table = comparison_table("toy")
    compare("toy")
    assert capsys.readouterr().out.split("\n\n")[1].count(" svamp ") == 3 # a row a model, in the last of two tables
    assert "test problems of svamp" in headline(table) and set(format_table(table)["data set"]) >= {"main", "svamp", "gsm_plus"}
    files = {k: v for n in (*names, base[0]["name"]) for k, v in evaluation_files(n, project / "eval_results").items()}
    add_files(project / "kept", files)
    assert archived_files(project / "kept") == files # fields that only some sets have come back as they were


# Chats, mixtures, formulas, other labels, leakage

def test_a_chat(project):
    def chat(*turns): return {"messages": [{"role": r, "content": c} for r, c in turns]}
    good = [chat(("user", f"What is {i}+1?"), ("assistant", f"{i + 1}\n#### {i + 1}")) for i in range(4)]
    system = chat(("system", "Be brief."), ("user", "And 9+1?"), ("assistant", "#### 10"))
    write(project / "chat.jsonl", jsonl([*good, system]))
    write(project / "configs" / "dataset" / "chat.yaml", "data: {source: folder, folder: ., files: {train: chat.jsonl}, "
          "messages: messages, validation_fraction: 0, licence: own}\n")
    rows = load_gsm8k(load_config("toy", dataset="chat"))["train"]
    assert rows[0] == {"id": "chat/train/0", "question": "What is 0+1?", "answer": "1\n#### 1", "final": "1"}
    assert rows[4]["question"] == "Be brief.\n\nAnd 9+1?"
    bad = [chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "#### 1")), {"messages": "hello"},
           {"messages": [{"role": "user"}]}, chat(("user", ["parts"]), ("assistant", "#### 1")), {"message": []}]
    says = ["line 1: the field 'messages' has the turns user, assistant, user, assistant", "line 2: the field 'messages' is not a list",
            "line 3: the field 'messages' is not a list", "line 4: the field 'messages' holds a content that is not text",
            "line 5: the field 'messages' is missing; data.messages can name another of: message"]
    write(project / "chat.jsonl", jsonl(bad))
    with pytest.raises(DataError) as e: load_gsm8k(load_config("toy", dataset="chat"))
    for text in says: assert text in str(e.value)


def test_text_without_final_answers_is_for_training_only(project):
    write(project / "talk.jsonl", jsonl({"question": f"Say {i}", "answer": f"All right, {i}."} for i in range(9)))
    entry = "data: {source: folder, folder: ., files: {train: talk.jsonl}, finals: text, licence: own}\n"
    write(project / "configs" / "dataset" / "talk.yaml", entry)
    cfg = load_config("toy", dataset="talk")
    assert load_gsm8k(cfg)["train"][0]["answer"].startswith("All right")
    with pytest.raises(DataError, match="talk has no final answers to grade; name other sets"): load_evaluated(cfg)
    assert load_evaluated(load_config("toy", dataset="talk", overrides="evaluation.datasets=[svamp]"))[0][0].data.dataset == "svamp"


def test_a_mixture_with_weights(project):
    write(project / "configs" / "dataset" / "both.yaml", "data: {mix: {main: 0.25, mine: 2.5}}\n")
    cfg = load_config("toy", dataset="both", overrides="data.validation_fraction=0.1 data.train_samples=20")
    data = load_gsm8k(cfg)
    ids = data["train"]["id"][:]
    counts = {i: ids.count(i) for i in ids}
    assert sorted(c for i, c in counts.items() if i.startswith("mine/")) == [2] * 10 + [3] * 10 # 20 problems, half of them once more
    assert [c for i, c in counts.items() if i.startswith("synthetic-main/")] == [1] * 5
    assert ids == load_gsm8k(cfg)["train"]["id"][:]
    apart = {n: load_gsm8k(load_config("toy", dataset=n, overrides="data.validation_fraction=0.1"))["validation"]["id"][:]
             for n in ("main", "mine")}
    assert data["validation"]["id"][:] == [*apart["main"], *apart["mine"]]
    assert [c.data.dataset for c in evaluated_datasets(cfg)] == ["main", "mine"]
    with pytest.raises(DataError, match="mine has no test split"): load_evaluated(cfg)


@pytest.mark.parametrize("mix, says", [
    ("{main: 0}", "data.mix.main: 0.0 is outside"), ("{man: 1}", "Did you mean 'main'"), ("{svamp: 1}", "svamp is for testing only"),
    ("{mine: 1, gsm_symbolic: 1}", "gsm_symbolic is for testing only"), # there is no data for it here
    ("{copy: 1, mine: 1}", "of train is the question of .*, which is held out"), ("{both: 1}", "data.mix.both: is a mixture itself"),
    ("{copy: {a: 1}}", "data.mix.copy: .* is outside")])
def test_a_mixture_that_cannot_be(project, mix, says):
    rows = [json.loads(l) for l in (project / "mine.jsonl").read_text().splitlines()]
    write(project / "copy.jsonl", jsonl(rows[::-1][:30]))
    text = (project / "configs" / "dataset" / "mine.yaml").read_text().replace("mine.jsonl", "copy.jsonl")
    write(project / "configs" / "dataset" / "copy.yaml", text)
    write(project / "configs" / "dataset" / "both.yaml", f"data: {{mix: {mix}, validation_fraction: 0.4}}\n")
    with pytest.raises((ConfigError, DataError), match=says): load_gsm8k(load_config("toy", dataset="both"))


def test_a_mixture_of_formulas_numbers_and_texts_is_trained(project):
    "Validation during training grades what has a final answer, by graders that all answers have"
    from gsm8k_sft.train import train
    for name, answer, finals in (
            ("forms", "\\boxed{x^2}", "latex, final: boxed"), ("talk", "All right.", "text"), ("sums", "#### 7", "number")):
        write(project / f"{name}.jsonl", jsonl({"question": f"{name} {i}?", "answer": answer} for i in range(9)))
        write(project / "configs" / "dataset" / f"{name}.yaml",
              f"data: {{source: folder, folder: ., files: {{train: {name}.jsonl}}, finals: {finals}, licence: own}}\n")
    for mix, verdicts in (("forms: 1, talk: 1, sums: 1", [(0, 0)]), ("talk: 1", [(None, None)])):
        write(project / "configs" / "dataset" / "all.yaml", f"data: {{mix: {{{mix}}}, validation_fraction: 0.3}}\n")
        cfg = load_config("toy", dataset="all", overrides="train.max_steps=2 train.eval_steps=2 evaluation.max_new_tokens=8")
        log = project / "runs" / "toy" / train(cfg, evaluate=False)["run_name"] / "log.jsonl"
        found = [e for line in log.read_text().splitlines() if "eval_loss" in (e := json.loads(line))]
        assert [(e.get("eval_accuracy_strict"), e.get("eval_accuracy_flexible")) for e in found] == verdicts, mix


def test_math_500_in_its_published_layout(project):
    rows = [{"problem": "Area of a circle of radius 2?", "solution": "It is $\\boxed{4\\pi}$.", "answer": "4\\pi", "subject": "Geometry",
             "level": 2, "unique_id": "test/geometry/1.json"},
            {"problem": "And 6*7?", "solution": "$\\boxed{42}$", "answer": "42", "subject": "Prealgebra", "level": 1, "unique_id": "x"}]
    write(project / "data" / "math_500" / "test.jsonl", jsonl(rows))
    data = load_gsm8k(load_config("toy", dataset="math_500", training=False))["test"]
    assert data["final"][:] == ["4\\pi", "42"] and (data[0]["subject"], data[0]["level"]) == ("Geometry", "2")
    for text, right in (("So \\boxed{4 \\pi\\text{ cm}^2}", True), ("\\boxed{4\\pi} no, \\boxed{2\\pi}", False), ("It is 4.", False)):
        found = grade_answer(text, data[0]["answer"])
        assert found["math"] is right and (found["class"] == "right") is right
    assert [grade_answer("The answer is 42.", data[1]["answer"])[g] for g in ("numeric", "math")] == [True, True]
    cfg = load_config("toy", overrides=f"{BRIEF} evaluation.datasets=[math_500]", training=False)
    [result] = evaluate_base(cfg, [0], progress=False)
    assert list(result["accuracy"]) == ["strict", "numeric", "flexible", "math"] and "extracted_math" in read_predictions(result)[0]


LATEX = [ # as MATH's own comparison has it, and values
    (r"\dfrac12", r"\frac{1}{2}", True), ("0.5", r"\frac12", True), ("1/2", r"\frac{1}{2}", True), (r"-\frac{1}{2}", "-0.5", True),
    (r"\sqrt3", r"\sqrt{3}", True), (r"\left(3, \frac{\pi}2\right)", r"(3,\frac{\pi}{2})", True), (r"10{,}080", r"10,\!080", True),
    (r"\text{Evelyn}", "Evelyn", True), (r"90^\circ", "90", True), (r"\$5.00", "5", True), (r"50\%", "50", True), ("x=3", "3", True),
    (r"5\text{ cm}", "5", True), (".5", "0.5", True), ("2x+1", "1+2x", False), ("(3,4)", "(4,3)", False), (r"\frac{1}{3}", "0.33", False),
    (r"5\text{ and }6", "5", False), (r"\frac{-1}{2}", r"-\frac12", True), (r"\frac{-1+x}{2}", r"-\frac{1+x}{2}", False),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
    ("42", "24", False), (r"\pi", "3.14", False), (r"\text{yes}", r"\text{no}", False), ("", "0", False)]


@pytest.mark.parametrize("found, gold, same", LATEX)
def test_formulas_are_compared_by_spelling_or_value(found, gold, same):
    assert same_latex(found, gold) is same and same_latex(gold, found) is same
    assert same_latex(found, f"Steps.\n#### \\boxed{{{gold}}}") is same


def test_a_set_of_formulas_has_its_grader_in_names_votes_and_archives(project):
    "Every published form of a formula, its grader's version in the protocol, maj@k and re-scoring by `math` too"
    rows = [{"question": f"Area {k}?", "answer": f"It is so.\n#### {final}"} for k, final in enumerate(["5", "\\boxed{4\\pi}", "\\frac12"])]
    for name, relabelled in (("areas", rows), ("others", [{**rows[1], "answer": "#### \\boxed{9}"}])):
        write(project / "data" / name / "test.jsonl", jsonl(relabelled))
        write(project / "configs" / "dataset" / f"{name}.yaml",
              "data: {source: folder, folder: data/%s, finals: latex, trainable: false, licence: own}\n" % name)
    data = load_gsm8k(load_config("toy", dataset="areas", training=False))["test"]
    assert data["final"][:] == ["5", "4\\pi", "\\frac12"] and all("#### \\boxed{" in a for a in data["answer"])
    cfg = load_config("toy", overrides="evaluation.datasets=[areas,main] evaluation.samples=2 evaluation.temperature=1 data.test_samples=3 "
                                       "evaluation.max_new_tokens=4", training=False)
    formulas, numbers = evaluate_base(cfg, [0], progress=False)
    assert formulas["protocol"]["grader"] == grader_versions(["math"]) != grader_versions() == numbers["protocol"]["grader"]
    assert list(formulas["sampled"]) == list(formulas["accuracy"]) == [*numbers["accuracy"], "math"]
    assert regrade(formulas["name"], data)["protocol"]["fingerprint"] == formulas["protocol"]["fingerprint"]
    assert for_one_table(read_evaluations("toy"))[0]["protocol"]["grader"] and len(for_one_table([formulas, numbers])) == 2
    old = formulas | {"protocol": formulas["protocol"] | {"grader": grader_versions()}}
    with pytest.warns(UserWarning, match="older graders"): assert for_one_table([old, numbers]) == [numbers]
    path = project / "eval_results" / f"{formulas['name']}.predictions.jsonl"
    answers = [a | {"text": "\\boxed{4 \\pi}"} for a in map(json.loads, path.read_text().splitlines())]
    path.write_text(jsonl(answers))
    table, changed = rescore(formulas["name"], load_gsm8k(load_config("toy", dataset="others", training=False))["test"])
    assert table.loc["math"].str.split().str[0].tolist() == ["33.3", "100.0", "0.0"] and list(changed["math"]) == ["True → False"] * 2
    stated = {"\\frac12": True, "0.7": False, "\\dfrac{1}{2}": True, "0.7 ": False, "1/2": True}
    votes = [{"id": 0, "math": right, "extracted_math": x} for x, right in stated.items()]
    assert majority(votes, "math") and not majority([{**v, "extracted_math": None} for v in votes], "math")
    assert grade_answer("So \\boxed{2\\pi}", data[1]["answer"])["class"] == "wrong plan" # a formula was stated
    kept = [json.loads(l) for p, data in evaluation_files(formulas["name"], project / "eval_results", answers="verdicts").items()
            if p.endswith("verdicts.jsonl") for l in data.splitlines()]
    assert len(kept) == 6 and all("math" in row for row in kept)


@pytest.mark.parametrize("n, first", [(1, "-first1"), (2, "-first2"), (3, ""), (500, "")])
def test_more_problems_are_asked_for_than_there_are(project, n, first):
    "A set that isn't larger is whole: its result has the name of the whole set, in a study too"
    job = Job("toy", "base", None, overrides=("evaluation.datasets=[svamp,gsm_plus_unanswerable]", f"data.test_samples={n}",
                                              "evaluation.max_new_tokens=2"), shots=(0,))
    names = [r["name"] for r in evaluate_base(job_config(job), [0], progress=False)]
    assert names == result_names(job) and f"__test{first}__" in names[0] and len(names) == 2
    assert is_done(job)
    asked = Job("toy", "base", "full", overrides=(f"data.test_samples={n}",), ask=("evaluation.split=validation",))
    assert "first" not in result_names(asked)[0] and "__validation__" in result_names(asked)[0]


def test_symbolic_and_platinum_in_their_published_layouts(project):
    row = {"id": 0, "instance": 3, "question": "Ann has 5 figs?", "answer": "5\n#### 5", "original_id": 7,
           "original_question": "Ann has 2 figs?", "original_answer": "2\n#### 2", "canary": "x"}
    write(project / "data" / "gsm_symbolic" / "GSM_symbolic.jsonl", jsonl([row, {**row, "instance": 4}])) # a question twice
    rows = load_gsm8k(load_config("toy", dataset="gsm_symbolic", training=False))["test"]
    assert (rows["template"][:], rows["instance"][:]) == (["0", "0"], ["3", "4"])
    place = project / "data" / "gsm8k_platinum" / "main"
    place.mkdir(parents=True)
    table = pa.table({"question": ["Q?"], "answer": ["1\n#### 1"], "cleaning_status": ["consensus"]})
    pq.write_table(table, place / "test-00000-of-00001.parquet")
    rows = load_gsm8k(load_config("toy", dataset="gsm8k_platinum", training=False))["test"]
    assert rows[0] == {"id": "gsm8k_platinum/test/0", "question": "Q?", "answer": "1\n#### 1", "final": "1", "cleaning_status": "consensus"}


def test_saved_answers_under_platinums_labels(project, capsys):
    "By question, whatever the spaces: revised labels turn verdicts over, removed questions are left out, and nothing is asked again"
    cfg = load_config("toy", overrides="data.test_samples=12 evaluation.max_new_tokens=8", training=False)
    [result] = evaluate_base(cfg, [0], progress=False)
    asked = load_gsm8k(cfg)["test"]
    path = project / "eval_results" / f"{result['name']}.predictions.jsonl"
    answers = [json.loads(l) for l in path.read_text().splitlines()]
    for i, a in enumerate(answers): a["text"] = f"#### {a['gold']}" if i < 6 else "#### 1000001" if i == 7 else "none" # six right
    path.write_text(jsonl(answers))
    kept = [{"question": f" {q}  ", "answer": "#### 1000001" if i in (0, 7) else a, "cleaning_status": "revised"}
            for i, (q, a) in enumerate(zip(asked["question"], asked["answer"])) if i != 3]
    (project / "data" / "gsm8k_platinum" / "main").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(kept), project / "data" / "gsm8k_platinum" / "main" / "test-00000-of-00001.parquet")
    rows = load_gsm8k(load_config("toy", dataset="gsm8k_platinum", training=False))["test"]
    table, changed = rescore(result["name"], rows)
    assert [v.split()[0] for v in table.loc["strict"]] == ["50.0", "45.5", "45.5"] and list(table)[:2] == ["12 answers", "11 of them"]
    assert list(changed["id"]) == ["synthetic-main/test/0", "synthetic-main/test/7"]
    assert list(changed["strict"]) == ["True → False", "False → True"] and set(changed["new label"]) == {"1000001"}
    before = path.read_bytes()
    main(relabel=str(path).replace(".predictions.jsonl", ".json"), dataset="gsm8k_platinum")
    assert "11 of them" in (said := capsys.readouterr().out) and "synthetic-main/test/7" in said and path.read_bytes() == before
    with pytest.raises(EvaluationError, match="none of its 12 questions"): rescore(result["name"], rows.select([]))
    with pytest.raises(SystemExit, match="mine has no test split"): main(relabel=str(path), dataset="mine")


def test_titles_call_a_set_by_its_name():
    "The toy's main and socratic are generated, others aren't, whoever is asked them"
    table = comparison_table(root=project_path("results")).query("preset == 'toy' and dataset == 'main'")
    for dataset, kind in (("main", "generated (synthetic)"), ("svamp", "svamp")):
        assert f" {kind} problems" in plot_comparison(table.assign(dataset=dataset)).get_title(loc="left")


def test_leakage_between_any_two_sets(project):
    rows = [json.loads(l) for l in (project / "mine.jsonl").read_text().splitlines()]
    write(project / "data" / "svamp" / "SVAMP.json", json.dumps([{**SVAMP, "Body": "What is 7", "Question": "and 7?"}, SVAMP]))
    found = audit("mine", "svamp", "toy")
    assert (found["level"][0], found["test"][0], found["train"][0]) == ("same text", "svamp/test/0", "mine/train/7")
    assert len(found[found["level"].isin(["same text", "normalised"])]) == 1 and len(rows) == 40
    assert not len(audit("gsm_plus_unanswerable", "svamp", "toy"))
