"Figures of many runs in seconds, the same bytes each time, with words beside them"
import json, time
import numpy as np
import pytest
from gsm8k_sft.analysis import save_figure
from gsm8k_sft.core import project_path
from gsm8k_sft.curves import alt_text, draw_curves, format_summary, plot_curves, plot_panels, summary_table
from gsm8k_sft.logs import read_logs


def many_runs(folder, runs, steps):
    "Log files of as many runs"
    draw = np.random.default_rng(0)
    for number in range(runs):
        loss = 2 * np.exp(-np.arange(steps) / 500) + draw.normal(0, 0.05, steps)
        rows = ({"step": s + 1, "epoch": s / steps, "loss": loss[s], "grad_norm": 1.0, "learning_rate": 1e-4, "tokens": 6000 * (s + 1),
                 "tokens_per_second": 20_000.0, "memory": 10**9, "seconds": 0.3 * (s + 1)} for s in range(steps))
        path = folder / f"full_main-s{number}" / "log.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return sorted(folder.glob("*/log.jsonl"))


def test_two_hundred_runs_load_and_draw_in_seconds(tmp_path):
    paths, took = many_runs(tmp_path, 200, 2000), []
    for _ in range(2):
        start = time.perf_counter()
        axes = plot_panels(read_logs(paths), "step")
        save_figure(axes, tmp_path / "panels")
        took.append(time.perf_counter() - start)
    print(f"{min(took):.1f} s")
    assert min(took) < 20, took # 10 s on two free cores


def test_the_same_bytes(tmp_path):
    logs = read_logs(many_runs(tmp_path, 2, 50))
    first, second = ([p.read_bytes() for p in save_figure(plot_curves(logs), tmp_path / n)] for n in ("a", "b"))
    assert first == second


def test_words_for_each_figure(tmp_path):
    words = draw_curves(tmp_path, "toy", project_path("results"))
    assert len(words) >= 5 and all(len(w) > 60 and w.endswith(".") for w in words.values())
    assert "First and last value" in alt_text(plot_curves(read_logs(many_runs(tmp_path / "logs", 2, 20))))


def test_a_metric_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no values of accuracy"): plot_curves(read_logs(many_runs(tmp_path, 1, 5)), "accuracy")


def test_summary_of_the_recorded_runs():
    table = summary_table("gemma-3-270m", project_path("results"))
    assert len(table) == 4 and (table["low"] < table["accuracy"]).all() and (table["p"] < 1e-6).all()
    assert format_summary(table).map(lambda v: isinstance(v, str)).all(axis=None)
