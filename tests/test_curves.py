"Figures of many runs in seconds, the same bytes each time, with words beside them"
import json, math
import numpy as np
import pandas as pd
import pytest
from gsm8k_sft.reporting.figures import alt_text, save_figure
from gsm8k_sft.core.config import project_path
from gsm8k_sft.core.runs import read_json, write_json
from gsm8k_sft.reporting.curves import (
    curve_figures, disagreements, discordant_pairs, format_summary, plot_cost, plot_curves, plot_discordant, plot_log,
    plot_loss_accuracy, plot_panels, plot_steps, summary_table)
from gsm8k_sft.reporting.logs import read_logs, tidy
from gsm8k_sft.evaluation.compare import compare
from gsm8k_sft.evaluation.results import read_runs


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


def test_two_hundred_runs_are_one_figure(tmp_path):
    axes = plot_panels(read_logs(many_runs(tmp_path, 200, 200)), "step")
    assert len(axes) == 5 and axes[0].get_legend_handles_labels()[1] == ["median of 200 runs"]
    assert all(p.stat().st_size < 2e6 for p in save_figure(axes, tmp_path / "panels")), "grey lines are an image"


def test_the_live_chart_grows(tmp_path):
    "From the first row on; without a gradient norm or a validation too"
    first = [{"step": 1, "loss": 2.0, "grad_norm": None, "learning_rate": 1e-4, "tokens": 90, "tokens_per_second": 900.0, "seconds": 0.1}]
    figure = plot_log(first)
    assert len(figure.axes) == 4 and figure.axes[0].get_legend() is None
    assert len((figure := plot_log(rows())).axes) == 4
    names = [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
    assert figure.axes[0].get_yscale() == "log" and names == ["training", "validation"]


def test_the_same_bytes(tmp_path):
    logs = read_logs(many_runs(tmp_path, 2, 50))
    first, second = ([p.read_bytes() for p in save_figure(plot_curves(logs), tmp_path / n)] for n in ("a", "b"))
    assert first == second


def test_words_for_each_figure(tmp_path):
    words = {name: alt_text(axes) for name, axes in curve_figures("toy", project_path("results"))}
    assert len(words) >= 5 and all(len(w) > 60 and w.endswith(".") for w in words.values())
    assert "First and last value" in alt_text(plot_curves(read_logs(many_runs(tmp_path / "logs", 2, 20))))


def test_a_metric_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no values of accuracy"): plot_curves(read_logs(many_runs(tmp_path, 1, 5)), "accuracy")


def test_summary_of_the_recorded_runs():
    table = summary_table("gemma-3-270m", project_path("results"))
    assert len(table) == len(read_runs("gemma-3-270m", project_path("results"))) >= 15
    assert (table["low"] < table["accuracy"]).all()
    assert table["p"].notna().sum() == 3 and (table["p"].dropna() < 1e-6).all(), "of seeds whose predictions are kept"
    assert format_summary(table).map(lambda v: isinstance(v, str)).all(axis=None)


def rows(steps=60, level=0.0):
    "A run's log: its steps, and one validation after the last"
    trained = [{"step": s, "epoch": s / steps, "loss": 2 / s + level, "grad_norm": 1.0, "learning_rate": 1e-4, "tokens": 90 * s,
                "tokens_per_second": 900.0, "memory": 2**30, "seconds": s / 10} for s in range(1, steps + 1)]
    return trained + [{"step": steps, "eval_loss": 0.3 + level}]


def write_run(root, name, method, **kwargs):
    folder = root / "toy" / name
    record = {"status": "complete", "preset": "toy", "run_name": name, "seed": 0, "tuning_method": method, "dataset": "main",
              "final_loss": 0.1, "parameters": {"total": 10**6, "trainable": 10**5}, "train_seconds": 6.0,
              "tokens_per_second": 900.0, "peak_memory": 2**30, "validation": {"eval_loss": 0.3}}
    write_json(folder / "record.json", record | kwargs)
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows()))
    return folder


def write_evaluation(root, model, k, run=None):
    rate = {"k": k, "n": 100, "value": k / 100, "low": max(0, k / 100 - 0.05), "high": min(1, k / 100 + 0.05)}
    record = {"status": "complete", "name": model, "configuration": {"preset": "toy", "run_name": run}, "model_type": model,
              "base_model": "toy", "dataset": "main", "split": "test", "n": 100,
              "accuracy": {g: rate for g in ("strict", "numeric", "flexible")}, "protocol": {"decoding": "greedy"}}
    write_json(root / "toy" / "eval" / f"{model}.json", record)


@pytest.fixture
def results(tmp_path):
    write_run(tmp_path, "full_main-s0", "full"), write_run(tmp_path, "lora_main-s0", "lora")
    write_evaluation(tmp_path, "base-0shot", 2), write_evaluation(tmp_path, "full", 40, "full_main-s0")
    return tmp_path


def names(root): return [name for name, _ in curve_figures("toy", root)]


def answers(right):
    return [{"id": str(i), "strict": bool(r), "numeric": bool(r), "gold": "1", "gold_steps": 1 + i % 3, "gold_length": 50}
            for i, r in enumerate(right)]


def test_summary_without_predictions(results):
    table = summary_table("toy", results).set_index("run_name")
    full, lora = table.loc["full_main-s0"], table.loc["lora_main-s0"]
    assert full.difference == pytest.approx(0.38) and math.isnan(full.p) and full.step_seconds == pytest.approx(0.1)
    assert math.isnan(lora.accuracy) and lora.best_eval_loss == 0.3 and lora.best_step == 60
    shown = format_summary(summary_table("toy", results))
    assert shown["p-value"].tolist() == ["–", "–"] and shown["step"][0] == "100 ms"
    assert shown["exact [95 %]"].tolist() == ["40.0 % [35.0, 45.0]", "–"]


def test_summary_of_nothing(tmp_path):
    assert summary_table(root=tmp_path).empty and format_summary(summary_table(root=tmp_path)).columns[0] == "run"
    assert list(curve_figures("toy", tmp_path)) == []


def test_a_run_without_log_or_with_an_empty_one(results):
    (results / "toy" / "full_main-s0" / "log.jsonl").unlink(), (results / "toy" / "lora_main-s0" / "log.jsonl").write_text("")
    assert summary_table("toy", results).eval_loss.isna().all()
    assert names(results) == ["toy-loss-accuracy", "toy-main-cost"]


def test_seconds_beside_other_runs_are_not_drawn(results):
    alone = names(results)
    path = results / "toy" / "full_main-s0" / "record.json"
    write_json(path, {k: v for k, v in read_json(path).items() if k != "schema_version"} | {"lanes": 3})
    assert set(alone) - set(names(results)) == {"toy-curves-seconds"}
    panels = np.ravel(dict(curve_figures("toy", results))["toy-curves-step"])
    drawn = [ax.get_ylabel() for ax in panels if ax.get_visible()]
    assert "peak memory, GiB" in drawn and not any("per second" in label for label in drawn)


def test_nan_leaves_a_gap(tmp_path):
    table = tidy({"a": [{"step": s, "loss": math.nan if s == 30 else 1.0} for s in range(1, 61)]})
    line = plot_curves(table).lines[1]
    assert np.isnan(line.get_ydata()).nonzero()[0].tolist() == [29]


def test_seeds_look_alike_and_datasets_are_dashed():
    ax = plot_curves(tidy({name: rows() for name in ("full_main-s0", "full_main-s1", "full_socratic-s0", "lora_main-s0")}))
    handles, labels = ax.get_legend_handles_labels()
    assert labels == ["full_main (2 seeds)", "full_socratic", "lora_main"]
    assert handles[0].get_color() == handles[1].get_color() != handles[2].get_color() and handles[1].get_linestyle() == "--"


def test_words_follow_the_numbers():
    ax = plot_discordant([compare(answers([1, 1, 0, 0]), answers([1, 0, 1, 1]), names=("a", "b"))])
    assert "1 of 4 problems solved by both, 1 by the first alone, 2 by the second alone, 0 by neither" in alt_text(ax)
    assert "a: 50.0 % at 1, 100.0 % at 2, 0.0 % at 3." in alt_text(plot_steps({"a": answers([1, 1, 0, 0])}))


def test_bars_by_steps_are_over_what_problems_were_made_from():
    "Ten templates, five of them right: 20 versions of each say no more than one of each"
    rows = [{"id": f"{t}-{v}", "template": t, "strict": t < 6, "numeric": t < 6, "gold_steps": 1} for t in range(1, 11) for v in range(20)]
    def ends(rows): return plot_steps({"a": rows}).containers[0][2][0].get_segments()[0][:, 1]
    (low, high), (low_alone, high_alone) = ends(rows), ends([{**r, "template": None} for r in rows])
    assert low < 20 and high > 80 and low_alone > 40 and high_alone < 60


def test_only_answers_to_the_same_problems_are_paired():
    few, many = answers([1, 0]), answers([1, 1, 0])
    assert discordant_pairs({"full SFT": many, "LoRA": few}) == [] and discordant_pairs({"LoRA": few}) == []
    found = discordant_pairs({"base, zero-shot": few, "full SFT": few, "LoRA": few})
    assert [(c.name_a, c.name_b) for c in found] == [("full SFT", "LoRA")]


def test_loss_and_accuracy_that_disagree():
    points = pd.DataFrame({"preset": "toy", "dataset": ["main"] * 3 + ["socratic"],
                           "run": ["full_main-s0", "full_main-s1", "lora_main-s0", "full_socratic-s0"],
                           "loss": [0.6, 0.5, 0.7, 0.1], "accuracy": [0.5, 0.4, 0.4, 0.3], "low": 0.3, "high": 0.6})
    assert disagreements(points) == (1, 2), "a tie counts for nothing, and losses of two data sets aren't compared"
    assert "disagree in 1 of 2 pairs" in alt_text(plot_loss_accuracy(points))
    assert plot_loss_accuracy(points).get_ylabel().startswith("exact: "), "the axis says by which grader"


def test_two_presets_share_no_figure():
    table = pd.DataFrame({"preset": ["a", "b"], "run": "full_main-s0", "loss": 1.0, "accuracy": 0.1, "strict": 0.1,
                          "trainable": 1.0, "train_seconds": 1.0, "peak_memory": 1.0})
    for plot in (plot_loss_accuracy, plot_cost):
        with pytest.raises(ValueError, match="one preset"): plot(table)


@pytest.mark.parametrize("names", [[f"full_main-s{i}" for i in range(31)], [f"full_main-lr{i}-s0" for i in range(8)]])
def test_many_runs_are_grey_with_their_median(names, tmp_path):
    ax = plot_curves(tidy({name: rows() for name in names}))
    assert ax.get_legend_handles_labels()[1] == [f"median of {len(names)} runs"] and f"{len(names)} runs; the median" in alt_text(ax)
    first, second = ([p.read_bytes() for p in save_figure(ax, tmp_path / n)] for n in "ab")
    assert first == second
