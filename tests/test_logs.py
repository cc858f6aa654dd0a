"Training logs as they are found: damaged, empty, resumed, of many kinds"
import json, math
import pytest
from gsm8k_sft.reporting.logs import COLUMNS, read_log, read_logs

STEPS = [{"step": s, "epoch": s / 10, "loss": 2.0 / s, "grad_norm": 1.0, "learning_rate": 1e-4, "tokens": 100 * s, "seconds": 2.0 * s}
         for s in range(1, 11)]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def our_log(folder, rows=STEPS): return write(folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in rows))

def values(table, metric="loss"): return table[table["metric"] == metric].sort_values("step")["value"].tolist()


def test_ours_and_a_trainers_are_equal(tmp_path):
    names = {"tokens": "num_input_tokens_seen", "seconds": "train_runtime"}
    history = [{names.get(k, k): v for k, v in r.items()} for r in STEPS]
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
    lines = ["Loading", "{'loss': '11.74', 'grad_norm': '21.75', 'epoch': '0.1'}",
             " 10%|#  | {'loss': '11.5', 'grad_norm': 'nan'}", "{'train_runtime': '3.2'}"]
    table = read_logs(write(tmp_path / "shown.txt", "\n".join(lines) + "\n"), logging_steps=10)
    assert values(table) == [11.74, 11.5] and sorted(table["step"].unique())[0] == 10


def test_an_empty_file_and_what_is_no_log(tmp_path):
    with pytest.warns(UserWarning, match="empty"): assert read_logs(write(tmp_path / "log.jsonl", "")).empty
    poem = write(tmp_path / "poem.txt", "roses are red")
    with pytest.raises(ValueError, match=r"poem\.txt: not a training log\. Known are .*trainer_state\.json"): read_logs(poem)
    nested = write(tmp_path / "nested" / "trainer_state.json", json.dumps({"state": {"log_history": STEPS[:2]}}))
    with pytest.raises(ValueError, match="trainer_state.json: no log_history at its top level"): read_logs(nested)
    (tmp_path / "poems").mkdir()
    with pytest.raises(ValueError, match="no log.jsonl"): read_logs(tmp_path / "poems")


def test_kinds_can_be_mixed(tmp_path):
    csv = write(tmp_path / "chart.csv", "Step,a - train/loss,a - train/loss__MIN,b - train/loss\n1,2.0,2.0,3.0\n2,1.0,1.0,\n")
    table = read_logs([our_log(tmp_path / "run"), csv])
    assert set(table["run"]) == {"run", "a", "b"}
    for run, losses in (("a", [2.0, 1.0]), ("b", [3.0])): assert values(table[table["run"] == run]) == losses


NO_STEP = ["[1, 2]", '"text"', '{"loss": 1}', '{"step": null}', '{"step": NaN, "loss": 1}', "\x00\xff", '{"step": 2} {"step": 3}']


@pytest.mark.parametrize("line", NO_STEP)
def test_lines_that_are_no_step(line, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n' + line + '\n{"step": 3, "loss": 1.0}\n', encoding="latin-1")
    with pytest.warns(UserWarning, match="line 2: not valid JSON with a step; skipped"): assert values(read_logs(path)) == [2.0, 1.0]


def test_a_damaged_first_line_does_not_hide_the_kind(tmp_path):
    path = write(tmp_path / "x", '{"st\n' + our_log(tmp_path / "run", STEPS[:2]).read_text())
    with pytest.warns(UserWarning, match="x, line 1"): assert values(read_logs(path)) == [2.0, 1.0]


def test_damaged_lines_of_text_and_csv(tmp_path):
    text = write(tmp_path / "out.txt", "{'epoch': '1', 'loss': '0.5'}\n{'loss': '0.5', 'gr\n{'loss': oops, 'epoch': 1}\n")
    with pytest.warns(UserWarning) as caught: assert values(read_logs(text)) == [0.5]
    assert ["line 2: not valid" in str(caught[0].message), "line 3: not valid" in str(caught[1].message)] == [True, True]
    csv = write(tmp_path / "e.csv", "Step,loss\n1,2\n2\n3,1\n")
    with pytest.warns(UserWarning, match="line 3: not valid CSV"): assert values(read_logs(csv)) == [2.0, 1.0]


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\x89PNG\r\n\x1a\n\x00", b'{"accuracy": 1}'])
def test_other_files_are_no_logs(content, tmp_path):
    (tmp_path / "odd.dat").write_bytes(content)
    with pytest.raises(ValueError, match=r"odd\.dat: not a training log"): read_logs(tmp_path / "odd.dat")


def test_printed_nan_and_a_logged_null(tmp_path):
    printed = "{'loss': nan, 'grad_norm': -inf, 'epoch': 1}\n{'loss': 'nan', 'grad_norm': 'inf', 'epoch': '2'}\n"
    table = read_logs(write(tmp_path / "out.txt", printed))
    assert [math.isnan(v) for v in values(table)] == [True, True] and values(table, "grad_norm") == [-math.inf, math.inf]
    assert values(read_logs(our_log(tmp_path / "run", [STEPS[0], STEPS[1] | {"grad_norm": None}])), "grad_norm") == [1.0]


def test_the_newest_checkpoint_speaks_for_a_trainers_folder(tmp_path):
    for n in (9, 10): write(tmp_path / "b" / f"checkpoint-{n}" / "trainer_state.json", json.dumps({"log_history": STEPS[:n]}))
    table = read_logs(tmp_path / "b")
    assert set(table["run"]) == {"b"} and len(values(table)) == 10


def test_two_runs_of_one_name(tmp_path):
    paths = [our_log(tmp_path / preset / "full_main-s0") for preset in ("toy", "gemma")]
    assert read_logs(paths)["run"].unique().tolist() == ["full_main-s0", "gemma/full_main-s0"]


def test_a_chart_without_steps(tmp_path):
    chart = write(tmp_path / "c.csv", '"Relative Time (Process)","a - loss"\n"1","2"\n')
    with pytest.raises(ValueError, match="no column of steps"): read_logs(chart)


def test_a_resumed_run_may_lose_no_row(tmp_path):
    "strict: a cut-off last line is dropped, any other damage is an error that names file and line"
    path = our_log(tmp_path / "run")
    text = path.read_text()
    path.write_text(text[:-9])
    assert read_log(path, strict=True) == read_log(path.parent) == STEPS[:-1]
    path.write_text(text.rstrip()) # whole, only the line end is missing
    assert read_log(path, strict=True) == STEPS
    for line in NO_STEP[:6]:
        path.write_text(text + line + "\n", encoding="latin-1")
        with pytest.raises(ValueError, match=r"log\.jsonl, line 11: not valid JSON with a step"): read_log(path, strict=True)
