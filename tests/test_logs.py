"Training logs as they are found: damaged, empty, resumed, of many kinds"
import json, math
import pytest
from gsm8k_sft.logs import COLUMNS, read_logs

STEPS = [{"step": s, "epoch": s / 10, "loss": 2.0 / s, "grad_norm": 1.0, "learning_rate": 1e-4, "tokens": 100 * s, "seconds": 2.0 * s} for s in range(1, 11)]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def our_log(folder, rows=STEPS): return write(folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in rows))

def values(table, metric="loss"): return table[table["metric"] == metric].sort_values("step")["value"].tolist()


def test_ours_and_a_trainers_are_equal(tmp_path):
    history = [{k: v for k, v in r.items() if k not in ("tokens", "seconds")} | {"num_input_tokens_seen": r["tokens"], "train_runtime": r["seconds"]} for r in STEPS]
    theirs = write(tmp_path / "theirs" / "trainer_state.json", json.dumps({"log_history": history}))
    table = read_logs([our_log(tmp_path / "ours"), theirs])
    assert list(table.columns) == COLUMNS and set(table["run"]) == {"ours", "theirs"}
    a, b = (table[table["run"] == r].drop(columns="run").reset_index(drop=True) for r in ("ours", "theirs"))
    assert a.equals(b)


def test_a_damaged_line_is_named_and_skipped(tmp_path):
    lines = our_log(tmp_path / "run").read_text().splitlines()
    path = write(tmp_path / "run" / "log.jsonl", "\n".join([*lines[:3], '{"step": 4, "loss": 0.', *lines[4:]]))
    with pytest.warns(UserWarning, match=r"log\.jsonl, line 4: not valid JSON with a step; skipped"): table = read_logs(path)
    assert sorted(table["step"].unique()) == [1, 2, 3, 5, 6, 7, 8, 9, 10]


def test_of_repeated_steps_the_last_counts(tmp_path):
    again = [r | {"loss": 9.0} for r in STEPS[5:]]
    assert values(read_logs(our_log(tmp_path / "run", STEPS[:8] + again)))[5:] == [9.0] * 5


def test_a_loss_that_is_not_a_number_stays(tmp_path):
    rows = [STEPS[0], STEPS[1] | {"loss": float("nan")}]
    found = values(read_logs(our_log(tmp_path / "run", rows)))
    assert found[0] == 2.0 and math.isnan(found[1])


def test_what_a_trainer_prints_is_text(tmp_path):
    path = write(tmp_path / "shown.txt", "Loading\n{'loss': '11.74', 'grad_norm': '21.75', 'epoch': '0.1'}\n 10%|#  | {'loss': '11.5', 'grad_norm': 'nan'}\n{'train_runtime': '3.2'}\n")
    assert values(read_logs(path, logging_steps=10)) == [11.74, 11.5] and sorted(read_logs(path, logging_steps=10)["step"].unique())[0] == 10


def test_an_empty_file_and_what_is_no_log(tmp_path):
    with pytest.warns(UserWarning, match="empty"): assert read_logs(write(tmp_path / "log.jsonl", "")).empty
    with pytest.raises(ValueError, match=r"poem\.txt: not a training log\. Known are .*trainer_state\.json"): read_logs(write(tmp_path / "poem.txt", "roses are red"))
    with pytest.raises(ValueError, match="no log.jsonl"): read_logs(tmp_path / "poems") if (tmp_path / "poems").mkdir() is None else None


def test_kinds_can_be_mixed(tmp_path):
    csv = write(tmp_path / "chart.csv", "Step,a - train/loss,a - train/loss__MIN,b - train/loss\n1,2.0,2.0,3.0\n2,1.0,1.0,\n")
    table = read_logs([our_log(tmp_path / "run"), csv])
    assert set(table["run"]) == {"run", "a", "b"} and values(table[table["run"] == "a"]) == [2.0, 1.0] and values(table[table["run"] == "b"]) == [3.0]
