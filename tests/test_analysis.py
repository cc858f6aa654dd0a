"Tables, figures, report and sweep from records as they are found on a disk: partial, damaged, many"
import json, os, re, subprocess, sys
from xml.etree import ElementTree

import pytest

from gsm8k_sft.analysis import draw_figures, draw_page_figures, plot_comparison, plot_results
from gsm8k_sft.evaluation.results import read_runs
from gsm8k_sft.reporting.figures import COLOURS, DARK, GRID, INK, PAPER, alt_text, figure_style, _svg_text
from gsm8k_sft.reporting.tables import average_seeds, comparison_table, format_table, headline, markdown_table
from gsm8k_sft.core.config import project_path, project_root
from gsm8k_sft.core.runs import write_json
from gsm8k_sft.report import make_report, _missing_runs
from gsm8k_sft.experiments.runner import do_jobs, run_notebook
from gsm8k_sft.experiments.study import Job, matrix_jobs


ALL = ("strict", "numeric", "flexible")


def rate(k, n=100): return {"k": k, "n": n, "value": k / n, "low": max(0, k / n - 0.05), "high": min(1, k / n + 0.05)}


def add_run(root, method, seed=0, preset="toy", **changes):
    variant = f"{method}_main"
    name = f"{variant}-s{seed}"
    record = {"status": "complete", "preset": preset, "variant": variant, "run_name": name, "seed": seed,
              "tuning_method": method, "dataset": "main", "parameters": {"total": 10**6, "trainable": 10**5},
              "train_seconds": 40.0, "tokens_per_second": 5000.0, "peak_memory": 1e9,
              "environment": {"git_commit": "abc", "cpu": "a CPU", "gpus": []}}
    write_json(root / preset / name / "record.json", record | changes)
    return root / preset / name


def add_evaluation(root, model, k, seed=0, preset="toy", **changes):
    run = {} if model.startswith("base") else {"variant": f"{model}_main", "run_name": f"{model}_main-s{seed}", "seed": seed}
    record = {"status": "complete", "name": model, "configuration": {"preset": preset, **run}, "model_type": model,
              "base_model": "toy", "dataset": "main", "split": "test", "n": 100,
              "accuracy": {"strict": rate(k), "flexible": rate(k + 5)},
              "protocol": {"prompt": "2 + 2?", "decoding": "greedy"}, "seconds": 5.0, "tokens_per_second": 900.0}
    write_json(root / preset / "eval" / f"{model}-{seed}.json", record | changes)


@pytest.fixture
def results(tmp_path):
    for seed, k in enumerate((80, 84, 88)):
        add_run(tmp_path, "full", seed), add_evaluation(tmp_path, "full", k, seed)
    for model, k in (("base-0shot", 0), ("base-1shot", 2)): add_evaluation(tmp_path, model, k)
    add_run(tmp_path, "lora", status="interrupted", train_seconds=None)
    return tmp_path


def test_three_seeds_become_one_line(results):
    means = average_seeds(comparison_table(root=results))
    assert means.model.tolist() == ["base-0shot", "base-1shot", "full"]
    assert means.seeds.tolist() == [1, 1, 3] and means.strict_mean[2] == pytest.approx(0.84)
    assert (means.strict_lowest[2], means.strict_highest[2]) == (0.80, 0.88)


def test_a_run_with_overrides_is_no_seed_of_the_plain_one(results):
    other = {"variant": "full_main", "run_name": "full_main-s0-1a2b3c", "seed": 0}
    add_evaluation(results, "full", 10, seed=7, configuration={"preset": "toy", **other})
    means = average_seeds(comparison_table(root=results))
    assert means.seeds.tolist() == [1, 1, 3, 1] and "| full SFT (full_main-1a2b3c) | 1 |" in headline(comparison_table(root=results))


def test_an_interrupted_run_keeps_its_row(results):
    shown = format_table(comparison_table(root=results)).set_index("model").loc["LoRA (interrupted)"]
    assert shown["exact [95 %]"] == "not evaluated" and shown["training"] == "–" and shown["tokens/s"] == "5,000"


def test_what_is_set_aside_or_under_way_is_not_counted(results):
    (results / "toy" / "full_main-s0").rename(results / "toy" / "full_main-s0.previous")
    add_evaluation(results, "qlora", 50, status="running")
    (results / "toy" / "eval" / "full-0.predictions.jsonl").write_text("{}\n")
    assert [r["run_name"] for r in read_runs(root=results)] == ["full_main-s1", "full_main-s2", "lora_main-s0"]
    assert "qlora" not in comparison_table(root=results).model.tolist()


def test_a_later_schema_is_left_out_with_a_warning(results):
    path = results / "toy" / "full_main-s0" / "record.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.warns(UserWarning, match="full_main-s0.*schema version 99"): assert len(read_runs(root=results)) == 3


def test_an_empty_log_draws_nothing(results):
    (results / "toy" / "full_main-s0" / "log.jsonl").write_text("")
    expected = [f"toy-main-{kind}.{end}" for kind in ("comparison", "cost") for end in ("png", "svg")]
    assert [p.name for p in draw_figures(results / "out", root=results)] == expected


def test_figures_are_the_same_bytes_twice(results):
    log = results / "toy" / "full_main-s0" / "log.jsonl"
    steps = [{"step": s, "loss": 2 / s, "grad_norm": 1, "learning_rate": 0.1, "tokens_per_second": 9} for s in range(1, 30)]
    log.write_text("".join(json.dumps(s) + "\n" for s in steps))
    first, second = (draw_figures(results / name, root=results, kinds=("png", "svg", "dark")) for name in "ab")
    kinds, ends = ("main-comparison", "curves-step", "main-cost"), (".png", ".svg", "-dark.svg")
    assert [p.name for p in first] == [f"toy-{kind}{end}" for kind in kinds for end in ends]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert list(first.values()) == list(second.values())
    assert not list(results.glob("a/.*")), "no temporary file stays"


def test_dark_figures_have_the_dark_colours_and_no_others(results):
    files = [p for p in draw_figures(results / "out", root=results, kinds=("png", "svg", "dark")) if p.name.endswith("-dark.svg")]
    for path in files:
        found = {c for line in ElementTree.parse(path).iter() for c in re.findall(r"#[0-9a-f]{6}", line.get("style", ""))}
        assert found <= {DARK.get(c, c) for c in (INK, PAPER, GRID, *COLOURS.values())} and DARK[PAPER] in found, path
        light = ElementTree.parse(path.with_name(path.name.replace("-dark", "")))
        assert len(list(light.iter())) == len(list(ElementTree.parse(path).iter()))
    assert len(files) == 2


def numbers(svg):
    "Each place in an SVG: its tag, its attribute and the numbers there"
    found = []
    for element in ElementTree.fromstring(svg).iter():
        places = [(k, v) for k, v in element.items() if k in ("d", "x", "y", "transform")]
        found += [(element.tag, k, [float(n) for n in re.findall(r"-?[0-9.]+", v)]) for k, v in places]
    return found


def test_a_small_svg_differs_by_a_hundredth_of_a_point(results):
    "Every number of matplotlib's own SVG is still there, in the same order, and nothing but places is rounded"
    import io
    with figure_style() as plt:
        figure, ax = plt.subplots()
        ax.plot([0.123456, 1 / 3, 0.9], [1e3, 2e5 / 7, 12345.678], "o-", label="a label")
        ax.legend()
        figure.savefig(whole := io.StringIO(), format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    small = _svg_text(figure)
    assert len(small) < 0.9 * len(whole.getvalue())
    for (tag, key, a), (_, _, b) in zip(numbers(whole.getvalue()), numbers(small), strict=True):
        assert len(a) == len(b) and all(abs(x - y) < 0.01 for x, y in zip(a, b)), (tag, key, a, b)
        if key == "transform" and len(a) == 1: assert a == b, "the size of letters"


def test_each_figure_has_words(results):
    words = draw_figures(results / "out", root=results)
    assert all(len(said) > 60 and said.endswith(".") for said in words.values())
    assert "full SFT: exact 84.0 % (seeds 80.0 to 88.0)." in words[results / "out" / "toy-main-comparison.svg"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="for Python 3.10 an older matplotlib is pinned, which sets text elsewhere")
def test_the_committed_figures_are_what_the_pages_show(tmp_path):
    "make figures draws these, to the byte, and README or analysis shows each; light and dark"
    drawn = draw_page_figures(tmp_path)
    committed = sorted(p.name for p in project_path("figures").iterdir())
    assert sorted(p.name for p in drawn) == committed and len(committed) <= 60
    for path in drawn: assert path.read_bytes() == project_path("figures", path.name).read_bytes(), path.name
    pages = "".join((project_root() / p).read_text(encoding="utf-8") for p in ("README.md", "nbs/04_analysis.ipynb"))
    for name in committed: assert f"figures/{name}" in pages, name


def test_the_one_picture_has_the_means_of_seeds(results):
    for seed, k in enumerate((6, 7, 8)): add_evaluation(results, "full", k, seed, preset="a-model", accuracy={g: rate(k) for g in ALL})
    add_evaluation(results, "base-0shot", 2, preset="a-model", accuracy={g: rate(2) for g in ALL})
    ax = plot_results(comparison_table(root=results))
    assert alt_text(ax).endswith("a-model: untuned 2.0 %, full SFT 7.0 %.") and "toy" not in alt_text(ax)


def test_different_problems_share_no_axis(results):
    table = comparison_table(root=results)
    with pytest.raises(ValueError, match="one preset, data set and number"): plot_comparison(table.assign(n=range(len(table))))


def test_a_small_try_is_drawn_apart(results):
    add_evaluation(results, "base-0shot", 1, seed=9, n=8)
    names = [p.stem for p in draw_figures(results / "out", root=results) if p.suffix == ".png"]
    assert names == ["toy-main-comparison-8", "toy-main-comparison-100", "toy-main-cost"]


def test_headline_says_what_is_synthetic(results):
    add_run(results, "full", preset="gemma-3-270m"), add_evaluation(results, "full", 7, preset="gemma-3-270m")
    text = headline(comparison_table(root=results)).replace("\N{NO-BREAK SPACE}", " ")
    assert text.index("gemma-3-270m") < text.index("synthetic") and "84.0 % [80.0, 88.0]" in text and "7.0 % [2.0, 12.0]" in text


def test_report_names_what_is_missing(results):
    text = make_report(results / "report", results).read_text()
    assert "**Toy runs only" in text and "- toy lora_main-s0" in text and "- toy full_main-s0" not in text
    assert "84.0\N{NO-BREAK SPACE}% (80.0\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}88.0)" in text
    assert (results / "report" / "toy-main-comparison.png").exists()
    assert _missing_runs(comparison_table(root=results), []) == []


def test_runs_that_nobody_evaluated(tmp_path):
    add_run(tmp_path, "full", preset="gemma-3-270m", status="trained")
    table, text = comparison_table(root=tmp_path), make_report(tmp_path / "report", tmp_path).read_text()
    assert headline(table) == "Trained but not evaluated yet: gemma-3-270m full SFT on main."
    assert "| full SFT (trained) | full_main-s0 | – | not evaluated |" in text and "- gemma-3-270m: base, zero-shot" in text


def test_report_of_nothing(tmp_path):
    text = make_report(tmp_path / "report", tmp_path / "results").read_text()
    assert "There are no records yet" in text
    for job in matrix_jobs():
        if job.preset == "toy": assert f"- toy {job.tuning}_main-s{job.seed}" in text


def test_markdown_keeps_its_columns():
    import pandas as pd
    assert markdown_table(pd.DataFrame({"a|b": ["x|y"], "n": [1]})) == "| a\\|b | n |\n| --- | ---: |\n| x\\|y | 1 |"


def test_a_sweep_goes_on_after_a_failure(monkeypatch, tmp_path):
    import papermill
    monkeypatch.setenv("GSM8K_SFT_PATHS_RUNS", str(tmp_path))
    calls = []
    def execute(notebook, out, parameters, **kwargs):
        calls.append(parameters)
        if parameters["tuning"] == "full": raise papermill.PapermillExecutionError(1, 1, "", "ConfigError", "seed: no\nmore", [])
    monkeypatch.setattr(papermill, "execute_notebook", execute)
    jobs = [Job("toy", f"{t}_main-s0", t) for t in ("full", "lora")]
    found = do_jobs(lambda: (jobs, 0), run_notebook)
    assert (found["done"], found["failed"]) == (1, {"full_main-s0 test": "ConfigError: seed: no"})
    assert calls[1]["overrides"].split() == ["run_name=lora_main-s0", "train.when_done=reuse"] and (tmp_path / "toy").is_dir()


def test_a_matrix_keeps_the_notebooks_of_earlier_ones(monkeypatch, tmp_path):
    import papermill
    monkeypatch.setenv("GSM8K_SFT_PATHS_RUNS", str(tmp_path))
    done = []
    monkeypatch.setattr(papermill, "execute_notebook", lambda notebook, out, **kwargs: done.append(out.write_text(str(len(done)))))
    for _ in range(3): run_notebook(Job("toy", "lora_main-s0", "lora"))
    kept = {p.name: p.read_text() for p in (tmp_path / "toy").iterdir()}
    assert kept == {"lora_main-s0.previous.ipynb": "0", "lora_main-s0.2.previous.ipynb": "1", "lora_main-s0.ipynb": "2"}


def shell(*args, **env): return subprocess.run([sys.executable, "-m", *args], capture_output=True, text=True, env={**os.environ, **env})


def test_commands_without_records(tmp_path):
    empty = {f"GSM8K_SFT_PATHS_{k}": str(tmp_path / k) for k in ("RUNS", "EVAL_RESULTS", "RESULTS", "FIGURES")}
    result = shell("gsm8k_sft.analysis", "--preset", "toy", **empty)
    assert result.returncode == 1 and "make demo" in result.stdout
    assert "nothing to draw" in shell("gsm8k_sft.analysis", "--figures", **empty).stdout
    planned = shell("gsm8k_sft.experiments.runner", "--dry-run", GSM8K_SFT_SWEEP_SEED="5", GSM8K_SFT_SWEEP_TUNING="lora")
    assert planned.stdout.splitlines() == ["toy lora_main-s5 test", "1 jobs now, 0 runs wait for a learning rate"]
    wrong = shell("gsm8k_sft.experiments.runner", "--dry-run", GSM8K_SFT_SWEEP_TUNING="lorra")
    assert wrong.returncode and "Did you mean 'lora'" in wrong.stderr and "Traceback" not in wrong.stderr


def test_error_tables_from_kept_predictions(tmp_path):
    "Predictions beside the results; drawn answers and other protocols stay out"
    from hashlib import sha256
    from gsm8k_sft.reporting.tables import error_table, read_answers, size_table
    from gsm8k_sft.grading.answers import grader_versions
    graders = grader_versions()
    def add(model, rows, **protocol):
        text = "".join(json.dumps(r) + "\n" for r in rows).encode()
        name = f"{model}{len(protocol)}"
        add_evaluation(tmp_path, model, 1, protocol={"grader": graders, "decoding": "greedy", "fingerprint": name} | protocol, name=name,
                       predictions_sha256=sha256(text).hexdigest(), seed=len(protocol))
        (tmp_path / "toy" / "eval" / f"{model}-{len(protocol)}.json").rename(tmp_path / "toy" / "eval" / f"{name}.json")
        path = tmp_path / "toy" / "eval" / f"{name}.predictions.jsonl"
        path.write_bytes(text)
    def row(i, kind):
        right = kind == "right"
        return {"id": f"t/{i}", "class": kind, "strict": right, "numeric": right, "gold_steps": i + 1, "gold_length": 50 + 300 * i}
    add("lora", [row(0, "right"), row(1, "wrong plan")])
    add("base-5shot", [row(0, "no final answer"), row(1, "cut at the limit")])
    add("full", [row(0, "right"), row(1, "right")], calculator=True)
    answers = read_answers("toy", root=tmp_path)
    assert list(answers) == ["base, 5-shot", "LoRA"]
    assert error_table(answers)["LoRA"].to_dict()["wrong plan"] == 50.0
    assert size_table(answers)["LoRA"].to_dict() == {"1": 100.0, "2": 0.0} and size_table(answers, "length").problems.sum() == 2
    (tmp_path / "toy" / "eval" / "base-5shot0.predictions.jsonl").write_text("{}\n")
    assert list(read_answers("toy", root=tmp_path)) == ["LoRA"], "predictions that are not the result's don't count"
    assert make_report(tmp_path / "out", tmp_path).read_text().count("| wrong plan |") == 1
