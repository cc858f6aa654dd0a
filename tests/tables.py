"""Every table that the project makes from results/, for tests/test_archive.py; `python tests/tables.py` writes tests/data/tables.json"""
import hashlib
import json
import sys
from pathlib import Path
import pandas as pd
from gsm8k_sft.benchmarks.generation import answers_table, speed_table
from gsm8k_sft.benchmarks.training import training_table
from gsm8k_sft.core.config import choices, project_path
from gsm8k_sft.core.runs import read_json
from gsm8k_sft.evaluation.results import read_evaluations, read_runs
from gsm8k_sft.experiments import tables
from gsm8k_sft.experiments.study import read_study
from gsm8k_sft.reporting.curves import disagreements, loss_accuracy, summary_table
from gsm8k_sft.reporting.logs import read_log
from gsm8k_sft.reporting.tables import average_seeds, comparison_table, error_table, ran_on, read_answers, size_table

FIXTURE = Path(__file__).parent / "data" / "tables.json"
PRESETS = ("gemma-3-270m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "toy")
OF_ALL = {name: getattr(tables, name) for name in ("headline_table", "cost_table", "contamination_table")}
RENAMED = {"workers": "lanes", "evaluated": "asked"} # columns that had other names when the tables were written down
OF_A_STUDY = ("choice_table", "outcome_table", "pair_table", "forgetting_table", "split_table")


def digest(table):
    "A checksum of a table's columns and values, floats in full"
    columns = sorted(table.columns)
    rows = [[repr(float(v)) if isinstance(v, (int, float)) else repr(v) for v in row] for row in table[columns].itertuples(index=False)]
    return hashlib.sha256(json.dumps([columns, rows]).encode()).hexdigest()[:16]


def plain(table):
    "Columns and rows of a DataFrame, without NaN and NumPy's types"
    table = table.reset_index() if table.index.name or not isinstance(table.index, pd.RangeIndex) else table
    cell = lambda v: None if v is None or v is pd.NA or v != v else v.item() if hasattr(v, "item") else v
    rows = [[cell(v) for v in row] for row in table.astype(object).itertuples(index=False)]
    return {"columns": [RENAMED.get(str(c), str(c)) for c in table.columns], "rows": rows}


def of_preset(preset, root):
    "A preset's tables"
    comparison = comparison_table(preset, root)
    found = {"comparison": plain(comparison), "seeds": plain(average_seeds(comparison)),
             "disagreements": list(disagreements(loss_accuracy(preset, root))), "loss_accuracy": plain(loss_accuracy(preset, root))}
    for metric in ("strict", "numeric"): found[f"summary {metric}"] = plain(summary_table(preset, root, metric=metric))
    for dataset in ("main", "socratic"):
        if not (answers := read_answers(preset, dataset, root)): continue
        found[f"answers {dataset}"] = {name: [len(a), sum(x["strict"] for x in a), sum(x["numeric"] for x in a),
                                              hashlib.sha256(json.dumps(a).encode()).hexdigest()[:16]] for name, a in answers.items()}
        found[f"errors {dataset}"] = plain(error_table(answers))
        for by in ("steps", "length"): found[f"sizes {dataset} {by}"] = plain(size_table(answers, by))
    return found | {"logs": {r["run_name"]: digest(pd.DataFrame(read_log(r["file"].parent))) for r in read_runs(preset, root)}}


def all_tables(root=None):
    "Every table, as JSON has it"
    root = root or project_path("results")
    found = {"presets": {p: of_preset(p, root) for p in PRESETS}, "studies": {}}
    for study in map(read_study, choices("study")):
        made = {name: plain(getattr(tables, name)(study, root)) for name in OF_A_STUDY}
        found["studies"][study.preset] = made | {"missing": tables.missing_jobs(study, root)}
    found |= {name: plain(make(root)) for name, make in OF_ALL.items()}
    training, generation = (read_json(Path(root) / "benchmark" / f"{n}.json") for n in ("training", "generation"))
    shapes, speeds = sorted({i["preset"] for i in training["items"]}), [k for k, v in generation.items() if "candidates" in str(v)]
    found["benchmark"] = {"training": {s: plain(training_table(training, s)) for s in shapes},
                          "speed": {s: plain(speed_table(generation, s)) for s in speeds}, "answers": plain(answers_table(generation))}
    found["ran on"] = ran_on(read_runs(root=root)).splitlines()
    found["counts"] = {"runs": len(read_runs(root=root)), "evaluations": len(read_evaluations(root=root))}
    return json.loads(json.dumps(found))


if __name__ == "__main__":
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_text(json.dumps(all_tables(), separators=(",", ":"), ensure_ascii=False) + "\n")
    print(FIXTURE.stat().st_size, "bytes", file=sys.stderr)
