"results/: the same tables as before it became archives; nothing lost in packing; writers that meet"
import json
import math
import re
from hashlib import sha256
import pytest
from commands import server
from gsm8k_sft.core.config import project_path
from gsm8k_sft.core.runs import read_json
from gsm8k_sft.evaluation.archive import (
    RECORDS, add_files, archived_files, evaluation_files, glob_files, read_bytes, read_record, run_files, unpack)
from gsm8k_sft.evaluation.results import complete_result, protocol_fingerprint, read_evaluations, read_predictions, read_runs, show_answers
from gsm8k_sft.reporting.logs import read_log, read_logs
from tables import FIXTURE, PRESETS, all_tables, of_preset

ARCHIVES = (*PRESETS, "earlier/h200x4")


def differences(a, b, where=""):
    "Where two JSON values differ, floats by more than 1e-12; the order of a table's columns doesn't count"
    if isinstance(a, dict) and isinstance(b, dict):
        a, b = ([dict(zip(t["columns"], row)) for row in t["rows"]] if t.keys() == {"columns", "rows"} else t for t in (a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{where}: only one has {k}" for k in a.keys() ^ b.keys()]
        return found + [d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{where}/{i}")]
    same = math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-12) if isinstance(a, float) and isinstance(b, float) else a == b
    return [] if same else [f"{where}: {str(a)[:200]} is {str(b)[:200]}"]


def test_two_presets_tables_as_they_were():
    before = json.loads(FIXTURE.read_text())["presets"]
    for name in ("toy", "gemma-3-270m"):
        now = json.loads(json.dumps(of_preset(name, project_path("results"))))
        assert differences(before[name], now, name) == []


@pytest.mark.slow
def test_every_table_as_it_was():
    assert differences(json.loads(FIXTURE.read_text()), all_tables()) == []


# quick: one archive of each kind
@pytest.mark.parametrize("name", [n if n in ("toy", "qwen2.5-coder-0.5b") else pytest.param(n, marks=pytest.mark.slow) for n in ARCHIVES])
def test_unpacked_and_packed_again_is_the_same(tmp_path, name):
    unpack(project_path("results", name), tmp_path / "folders")
    files = {p.relative_to(tmp_path / "folders").as_posix(): p.read_bytes() for p in (tmp_path / "folders").rglob("*") if p.is_file()}
    add_files(tmp_path / "again", files)
    assert archived_files(tmp_path / "again") == files == archived_files(project_path("results", name))


def test_predictions_match_the_checksum_in_their_record():
    n = 0
    for name in PRESETS:
        files = archived_files(project_path("results", name))
        for path in (p for p in files if p.endswith(".predictions.jsonl")):
            record, n = json.loads(files[path.replace(".predictions.jsonl", ".json")]), n + 1
            assert record["predictions_sha256"] == sha256(files[path]).hexdigest(), path
    assert n == 25


def test_no_fingerprint_is_stale():
    "Regrading changes a protocol; ten records had kept their old fingerprint, and say so; no untuned model's verdicts are numeric 1's"
    regraded = carried = 0
    for name in ARCHIVES:
        for path, data in archived_files(project_path("results", name)).items():
            if not path.endswith(".json") or "protocol" not in (record := json.loads(data)): continue
            assert record["protocol"]["fingerprint"] == protocol_fingerprint(record["protocol"]), path
            regraded += "fingerprint was" in record.get("note", "")
            if "verdicts are those of gsm8k_sft 1" in record.get("note", ""):
                carried += 1
                assert not record["model_type"].startswith("base"), path
    assert (regraded, carried) == (10, 127), "numeric 2 can't grade what has no texts, and the records say so"


def test_live_folders_and_an_archive_read_alike(tmp_path):
    archive, live = project_path("results", "toy"), tmp_path / "toy"
    unpack(archive, live)
    strip = lambda records: [{k: v for k, v in r.items() if k != "file"} for r in records]
    for read in (read_runs, read_evaluations): assert strip(read("toy", tmp_path)) == strip(read("toy", project_path("results")))
    name = "toy-lora_main-s0__test__lora__toy__main"
    assert read_predictions(name, live / "eval") == read_predictions(name, archive / "eval")
    assert complete_result(live / "eval", name) == complete_result(archive / "eval", name) != None
    assert read_log(live / "lora_main-s0") == read_log(archive / "lora_main-s0")
    assert read_logs(glob_files(live, "*/log.jsonl")).equals(read_logs(glob_files(archive, "*/log.jsonl")))
    assert read_bytes(archive / "lora_main-s9" / "log.jsonl") is None and read_bytes(tmp_path / "none" / "log.jsonl") is None
    with pytest.raises(FileNotFoundError): read_record(archive / "lora_main-s9" / "record.json")


def test_a_file_of_the_same_path_is_replaced_and_the_others_stay(tmp_path):
    unpack(project_path("results", "toy"), tmp_path / "toy")
    add_files(tmp_path / "out", run_files(tmp_path / "toy" / "full_main-s0") | run_files(tmp_path / "toy" / "full_main-s1", "ablations"))
    record = read_json(tmp_path / "toy" / "full_main-s0" / "record.json") | {"final_loss": 0.125}
    add_files(tmp_path / "out", {"full_main-s0/record.json": json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n"})
    assert read_record(tmp_path / "out" / "full_main-s0" / "record.json")["final_loss"] == 0.125
    assert read_bytes(tmp_path / "out" / "full_main-s0" / "log.jsonl") == (tmp_path / "toy" / "full_main-s0" / "log.jsonl").read_bytes()
    assert len(archived_files(tmp_path / "out")) == 6 and len((tmp_path / "out" / RECORDS).read_text().splitlines()) == 2


def test_answers_of_another_result_don_t_count(tmp_path):
    name = "toy-lora_main-s0__test__lora__toy__main"
    files = evaluation_files(name, project_path("results", "toy", "eval"))
    add_files(tmp_path, files)
    assert complete_result(tmp_path / "eval", name)
    path = f"eval/{name}.predictions.jsonl"
    add_files(tmp_path, {path: files[path].replace(b'"strict": true', b'"strict": false', 1)})
    assert complete_result(tmp_path / "eval", name) is None


def _add_run(folder, run): add_files(folder, run_files(run))


def test_two_writers_lose_nothing(tmp_path):
    unpack(project_path("results", "toy"), tmp_path / "toy")
    runs = sorted(p.parent for p in (tmp_path / "toy").glob("*/record.json"))
    writers = [server.Process(target=_add_run, args=(tmp_path / "out", run)) for run in runs[:3]]
    for w in writers: w.start()
    for w in writers: w.join()
    assert len(glob_files(tmp_path / "out", "*/record.json")) == 3


def test_right_and_wrong_answers_are_picked_over_the_file():
    base = {"question": "?", "text": "", "gold": "1", "finish_reason": "stop"}
    some = [base | {"strict": i % 4 == 0, "id": f"id{i}"} for i in range(20)]
    picked = lambda **k: [int(i) for i in re.findall(r"id(\d+)", show_answers(some, **k).data)]
    assert (picked(), len(picked(n=12)), picked(right=1, wrong=1)) == ([0, 4, 12, 1, 10], 12, [0, 1])


def test_reasons_to_stop_agree_with_the_numbers_of_tokens():
    "Cut at the limit means all tokens used; where answers that end at a text had gone on to the limit, their record says how many"
    for name in ARCHIVES:
        files = archived_files(project_path("results", name))
        for path in (p for p in files if p.endswith((".predictions.jsonl", ".verdicts.jsonl"))):
            record, answers = json.loads(files[path.rsplit(".", 2)[0] + ".json"]), [json.loads(line) for line in files[path].splitlines()]
            limit = record["protocol"]["max_new_tokens"]
            full = {why: sum(a["n_tokens"] == limit for a in answers if a["finish_reason"] == why) for why in ("stop", "length")}
            assert record["finish_reasons"].get("length", 0) == full["length"] and max(a["n_tokens"] for a in answers) <= limit, path
            assert sum(record["finish_reasons"].values()) == len(answers), path
            assert sum(a["n_tokens"] for a in answers) == record["new_tokens"], path
            if "gone on to" not in record.get("note", ""): assert full["stop"] <= 2, path # an end that came last
            else: assert f"{full['stop']} answers that end at a stop text had gone on to {limit}" in record["note"], path


@pytest.mark.parametrize("stale", [False, True])
def test_a_stale_fingerprint_is_found_in_a_folder_too(tmp_path, stale):
    name = "toy-lora_main-s0__test__lora__toy__main"
    add_files(tmp_path, evaluation_files(name, project_path("results", "toy", "eval")))
    unpack(tmp_path, tmp_path / "folder")
    path = tmp_path / "folder" / "eval" / f"{name}.json"
    record = read_json(path)
    if stale: path.write_text(json.dumps(record | {"protocol": record["protocol"] | {"max_new_tokens": 7}}))
    [protocol] = [read_record(p)["protocol"] for p in glob_files(path.parent, "*.json")]
    assert (protocol["fingerprint"] != protocol_fingerprint(protocol)) == stale
