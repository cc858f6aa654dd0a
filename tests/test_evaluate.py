"Evaluation: killed and resumed, damaged files, the command line, real shapes of data"
import hashlib, json, re
import pytest
import torch
from commands import finish, server
from omegaconf import OmegaConf
from gsm8k_sft import evaluate as module
from gsm8k_sft.core.config import load_config, project_root
from gsm8k_sft.core.runs import save_config, write_json
from gsm8k_sft.data.datasets import load_gsm8k, question_key
from gsm8k_sft.evaluate import evaluate, evaluate_base, evaluate_run, quick_accuracy, regrade
from gsm8k_sft.evaluation import results
from gsm8k_sft.evaluation.results import (
    EvaluationError, complete_result, find_run, keep_trained, open_partial, protocol_fingerprint, read_predictions,
    refuse_trained, result_name, shot_examples, show_answers, whole_lines)
from gsm8k_sft.generation.engine import Engine
from gsm8k_sft.grading.answers import grader_versions
from gsm8k_sft.models.loading import load_model, load_tokenizer
from gsm8k_sft.statistics.intervals import wilson_interval

BRIEF = "evaluation.max_new_tokens=16 evaluation.batch_size=4 evaluation.save_every=1"
NAME = "toy__test-first60__base-0shot-16new__toy__main"
CODE = """
import os, signal, torch
from pathlib import Path
from gsm8k_sft import evaluate as module
from gsm8k_sft.core.config import load_config
torch.set_num_threads(1)
def killed(*args, **kwargs):
    for number, answer in enumerate(generate(*args, **kwargs)):
        if number == 30: os.kill(os.getpid(), signal.SIGKILL)
        yield answer
generate, module.generate = module.generate, killed
module.evaluate_base(load_config("toy", overrides="{brief}"), shots=[0], limit=60, folder=Path({folder!r}))
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Tiny batches gain nothing from two threads, and lose much where the cores are shared"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as m:
        m.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def toy():
    cfg = load_config("toy", overrides=BRIEF)
    return load_model(cfg, dtype="fp32"), load_tokenizer(cfg), load_gsm8k(cfg, splits=["test"])["test"], cfg


def without(record, *keys): return {k: v for k, v in record.items() if k not in keys}


def content(folder, name=NAME): return [without(a, "seconds", "batch_size") for a in read_predictions(name, folder)]


def test_killed_and_resumed(tmp_path, toy):
    "SIGKILL after thirty of sixty answers: all thirty are kept, and the rest gives the same result"
    model, tokenizer, rows, cfg = toy
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    reference = evaluate(model, tokenizer, rows, cfg, "base-0shot", limit=60, folder=whole, progress=False)
    process = server.Process(target=exec, args=(CODE.format(brief=BRIEF, folder=str(folder)), {}))
    process.start(), process.join()
    partial = folder / f"{NAME}.partial.jsonl"
    assert process.exitcode == -9 and len(whole_lines(partial)[0]) - 1 == 30
    resumed = evaluate(model, tokenizer, rows, cfg, "base-0shot", limit=60, folder=folder, progress=False)
    assert content(folder) == content(whole) and resumed["accuracy"] == reference["accuracy"]
    assert resumed["resumed_answers"] == 30 and not partial.exists()
    assert resumed["protocol"] == reference["protocol"]


@pytest.mark.parametrize("step", ["predictions", "result", "partial"])
def test_a_crash_while_finishing_loses_nothing(step, tmp_path, toy, monkeypatch):
    model, tokenizer, rows, cfg = toy
    ask = lambda: evaluate(model, tokenizer, rows, cfg, "base-0shot", limit=6, folder=tmp_path, progress=False)
    stop = lambda *args, **kwargs: (_ for _ in ()).throw(OSError("the power fails"))
    writers = {"predictions": (results, "write_text"), "result": (results, "write_json"), "partial": (type(tmp_path), "unlink")}
    with monkeypatch.context() as m:
        m.setattr(*writers[step], stop)
        with pytest.raises(OSError, match="power"): ask()
    monkeypatch.setattr(module, "generate", lambda m, t, prompts, *args, **kwargs: iter(()) if not prompts else stop())
    assert ask()["n"] == 6 and ask()["accuracy"]


def test_torn_line_is_dropped_and_said(tmp_path, toy, capsys):
    model, tokenizer, rows, cfg = toy
    ask = lambda folder: evaluate(model, tokenizer, rows, cfg, "base-0shot", limit=6, folder=folder)
    name = ask(tmp_path)["name"]
    whole = content(tmp_path, name)
    lines = (tmp_path / f"{name}.predictions.jsonl").read_text().splitlines(keepends=True)
    protocol = json.loads((tmp_path / f"{name}.json").read_text())["protocol"]["fingerprint"]
    for cut in (1, 40, len(lines[2]) - 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / f"{name}.partial.jsonl").write_text(json.dumps({"protocol": protocol}) + "\n" + lines[4] + lines[0] + lines[2][:cut])
        assert ask(folder)["resumed_answers"] == 2 and content(folder, name) == whole
        assert "cut off in writing" in capsys.readouterr().out
    (tmp_path / "1" / f"{name}.json").unlink()
    (tmp_path / "1" / f"{name}.partial.jsonl").write_text('{"protocol": ')
    assert ask(tmp_path / "1")["resumed_answers"] == 0


def test_damage_is_named(tmp_path, toy):
    model, tokenizer, rows, cfg = toy
    ask = lambda: evaluate(model, tokenizer, rows, cfg, "base-0shot", limit=6, folder=tmp_path)
    name = result_name(cfg, "base-0shot", 6)
    (tmp_path / f"{name}.partial.jsonl").write_text('{"protocol": "x"}\n{"id": \n{}\n')
    with pytest.raises(EvaluationError, match=r"partial.jsonl, line 2: not valid JSON; delete"): ask()
    (tmp_path / f"{name}.partial.jsonl").unlink()
    ask()
    (tmp_path / f"{name}.json").write_text("{")
    with pytest.raises(ValueError, match=r"\.json: not valid JSON .* delete it"): ask()


# Names

CHANGES = ["evaluation.max_new_tokens=15", "evaluation.dtype=bf16", "evaluation.engine=transformers", "data.prompt_style=plain",
           "evaluation.calculator=true", "evaluation.temperature=0.7", "evaluation.temperature=0.7000001", "evaluation.split=validation",
           "evaluation.temperature=0.7 evaluation.top_p=0.9", "evaluation.temperature=0.7 evaluation.seed=1",
           "evaluation.temperature=0.7 evaluation.samples=2", "evaluation.split=validation data.validation_seed=1",
           "evaluation.split=validation data.validation_fraction=0.1", "data.source=folder data.folder=/a/mine",
           "data.source=folder data.folder=/b/mine", "data.source=hub", "data.source=hub data.hub_name=a/b",
           "data.source=hub data.hub_name=a-b", "data.source=hub data.hub_revision=v1"]
ONLY_BASE = ["one_shot_example.answer=18", "model.revision=abc", "model.attn_implementation=eager"]
ONLY_SHOTS = ["evaluation.seed=1", "data.train_samples=99", "data.validation_seed=1", "data.validation_fraction=0.1"]

@pytest.mark.parametrize("kind, changes", [("full", CHANGES), ("base-1shot", CHANGES + ONLY_BASE), ("base-8shot", CHANGES + ONLY_SHOTS)])
def test_what_changes_answers_is_in_the_name(kind, changes):
    cfg = load_config("toy", overrides="run_name=mine")
    names = [result_name(OmegaConf.merge(cfg, OmegaConf.from_dotlist(c.split())), kind) for c in ["", *changes]]
    assert names[0] == f"toy{'-mine' * (kind == 'full')}__test__{kind}__toy__main" and len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)

@pytest.mark.parametrize("change", ["evaluation.batch_size=3", "evaluation.save_every=7", "evaluation.seed=4", "evaluation.top_p=0.5",
                                    "data.train_samples=9", "data.validation_seed=3", "train.max_steps=5"])
def test_what_changes_no_answer_is_not(change):
    assert result_name(load_config("toy", overrides=change), "base-1shot") == "toy__test__base-1shot__toy__main"

def test_a_preset_of_ones_own_has_its_own_short_name(tmp_path, monkeypatch):
    (tmp_path / "configs" / "preset").mkdir(parents=True)
    (tmp_path / "configs" / "preset" / "mine.yaml").write_text("model: {name: toy}\nevaluation: {max_new_tokens: 64}\n")
    monkeypatch.chdir(tmp_path)
    assert result_name(load_config("mine", training=False), "base-0shot") == "mine__test__base-0shot__toy__main"
    cfg = load_config("mine", overrides="evaluation.max_new_tokens=512", training=False)
    (tmp_path / "configs" / "preset" / "mine.yaml").unlink()
    assert result_name(cfg, "base-0shot") == "mine__test__base-0shot__toy__main", "without its file, base.yaml counts"

@pytest.mark.parametrize("override,differs", [
    ("data.question=Body", True), ("data.only={Type: [Addition]}", True), ("data.files.test=mine.json", True),
    ("data.keep.Body=Body", False), ("data.licence=unknown", False)])
def test_how_rows_are_read_stands_in_the_name(override, differs):
    names = [result_name(load_config("toy", dataset="svamp", overrides=o, training=False), "base-0shot") for o in ([], [override])]
    assert (names[0] != names[1]) == differs

@pytest.mark.parametrize("change", ["evaluation.max_new_tokens=15", "one_shot_example.answer=18"])
def test_a_probe_stands_beside_the_result(change, tmp_path, toy):
    model, tokenizer, rows, cfg = toy
    other = load_config("toy", overrides=f"{BRIEF} {change}")
    first, second = (evaluate(model, tokenizer, rows, c, "base-1shot", 1, limit=5, folder=tmp_path, progress=False) for c in (cfg, other))
    assert first["name"] != second["name"] and second["differs"] and not (tmp_path / "previous").exists()
    assert [complete_result(tmp_path, r["name"]) for r in (first, second)] == [first, second]

def test_another_batch_size_is_the_same_evaluation(tmp_path, toy, monkeypatch):
    model, tokenizer, rows, cfg = toy
    first = evaluate(model, tokenizer, rows, cfg, "base-1shot", 1, limit=5, folder=tmp_path, progress=False)
    monkeypatch.setattr(module, "generate", lambda *args, **kwargs: 1 / 0)
    other = load_config("toy", overrides=f"{BRIEF} evaluation.batch_size=3")
    assert evaluate(model, tokenizer, rows, other, "base-1shot", 1, limit=5, folder=tmp_path, progress=False) == first


def test_two_prompt_styles_stand_side_by_side(tmp_path, toy):
    "An instruct model's template and the plain prompt are both asked of a base model, and neither result makes way for the other"
    model, tokenizer, rows, cfg = toy
    plain = load_config("toy", overrides=f"{BRIEF} data.prompt_style=plain")
    first, second = (evaluate(model, tokenizer, rows, c, "base-1shot", 1, limit=5, folder=tmp_path, progress=False) for c in (cfg, plain))
    assert second["name"] == first["name"].replace("base-1shot", "base-1shot-plain") and not (tmp_path / "previous").exists()
    assert second["differs"] == first["differs"] == ["16new"]
    assert first["protocol"]["prompt"] != second["protocol"]["prompt"] and complete_result(tmp_path, first["name"]) == first


def test_other_weights_or_problems_are_another_evaluation(tmp_path, toy):
    model, tokenizer, rows, cfg = toy
    ask = lambda model, rows: evaluate(model, tokenizer, rows, cfg, "base-0shot", limit=5, folder=tmp_path, progress=False)
    seen = [ask(model, rows), ask(model, rows.select(range(1, 20)))]
    changed = load_model(cfg, dtype="fp32")
    with torch.no_grad(): changed.model.norm.weight[0] += 1
    seen.append(ask(changed, rows))
    assert len({r["protocol"]["fingerprint"] for r in seen}) == len({r["name"] for r in seen}) == 3
    assert [complete_result(tmp_path, r["name"]) for r in seen] == seen and not (tmp_path / "previous").exists()
    assert [bool(r["differs"][1:]) for r in seen] == [False, True, True] and ask(changed, rows) == seen[2]


def test_seed_is_no_part_of_the_protocol(tmp_path, toy):
    "All seeds of a preset share the base model's result"
    model, tokenizer, rows, cfg = toy
    other = load_config("toy", "lora", seed=3, overrides=BRIEF)
    first, second = (evaluate(model, tokenizer, rows, c, "base-0shot", limit=5, folder=tmp_path, progress=False) for c in (cfg, other))
    assert first == second


def test_one_process_at_a_time(tmp_path, toy):
    model, tokenizer, rows, cfg = toy
    with open_partial(tmp_path, result_name(cfg, "base-0shot", 5), "x"):
        with pytest.raises(EvaluationError, match="another process"):
            evaluate(model, tokenizer, rows, cfg, "base-0shot", limit=5, folder=tmp_path)


def test_out_of_memory_is_in_the_record(tmp_path, toy, monkeypatch):
    model, tokenizer, rows, cfg = toy
    decode = Engine.decode
    def limited(self, steps):
        if self.rows > 2: raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, steps)
    monkeypatch.setattr(Engine, "decode", limited)
    record = evaluate(model, tokenizer, rows, cfg, "base-0shot", limit=5, folder=tmp_path, progress=False)
    assert record["protocol"]["batch_size"] == 4 and record["batch_sizes"] == {"2": 5}


def test_engines_give_the_same_answers(tmp_path, toy):
    model, tokenizer, rows, cfg = toy
    other = load_config("toy", overrides=f"{BRIEF} evaluation.engine=transformers")
    def ask(cfg):
        folder = tmp_path / cfg.evaluation.engine
        return evaluate(model, tokenizer, rows, cfg, "base-1shot", 1, limit=9, folder=folder, progress=False)
    first, second = ask(cfg), ask(other)
    assert (first["protocol"]["engine"], second["protocol"]["engine"]) == ("slots", "transformers")
    assert content(tmp_path / "auto", first["name"]) == content(tmp_path / "transformers", second["name"])


def test_shots_come_from_train(toy):
    _, _, rows, cfg = toy
    train = {r["question"] for r in load_gsm8k(cfg, splits=["train"])["train"]}
    held = {r["question"] for split in ("test", "validation") for r in load_gsm8k(cfg, splits=[split])[split]}
    eight = shot_examples(cfg, 8, rows)
    assert len({e["question"] for e in eight}) == 8 and {e["question"] for e in eight} <= train - held
    other = load_config("toy", overrides="evaluation.seed=1")
    assert shot_examples(other, 8, rows) != eight


def test_drawn_answers_resume_and_are_counted(tmp_path, toy):
    model, tokenizer, rows, _ = toy
    cfg = load_config("toy", overrides=f"{BRIEF} evaluation.samples=4 evaluation.temperature=0.9 evaluation.top_p=0.95")
    ask = lambda folder: evaluate(model, tokenizer, rows, cfg, "base-1shot", 1, limit=6, folder=folder, progress=False)
    whole = ask(tmp_path / "whole")
    answers = read_predictions(whole, tmp_path / "whole")
    assert [(a["id"], a["sample"]) for a in answers] == [(i, k) for i in rows["id"][:6] for k in range(4)]
    assert (whole["n"], whole["samples"]) == (6, 4)
    assert len({a["text"] for a in answers if a["id"] == rows["id"][0]}) > 1
    (tmp_path / "part").mkdir()
    ungraded = "id sample question gold prompt text n_tokens finish_reason seconds batch_size".split()
    raw = [{k: a[k] for k in ungraded} for a in answers]
    lines = [{"protocol": whole["protocol"]["fingerprint"]}, raw[2], raw[9]]
    (tmp_path / "part" / f"{whole['name']}.partial.jsonl").write_text("".join(json.dumps(l) + "\n" for l in lines))
    resumed = ask(tmp_path / "part")
    assert resumed["resumed_answers"] == 2
    assert content(tmp_path / "part", whole["name"]) == content(tmp_path / "whole", whole["name"])
    assert resumed["sampled"] == whole["sampled"] and set(whole["sampled"]["strict"]) == {"maj@4", "pass@1", "pass@2", "pass@4"}
    for g in ("strict", "numeric", "flexible"): assert whole["sampled"][g]["pass@1"] == pytest.approx(whole["accuracy"][g]["value"])


IMPOSSIBLE = {
    "evaluation.samples=2": "need evaluation.temperature",
    "evaluation.temperature=-1": "is outside",
    "evaluation.top_p=1.5": "is outside",
    "evaluation.engine=transformers evaluation.calculator=true": "greedily and without a calculator",
    "evaluation.shots=[-1]": "is outside",
    "evaluation.engine=fast": "evaluation.engine",
}


def test_impossible_ways_to_answer():
    for part, says in IMPOSSIBLE.items():
        with pytest.raises(ValueError, match=says): load_config("toy", overrides=part)


def test_old_predictions_are_graded_again(tmp_path, toy, monkeypatch):
    model, tokenizer, rows, cfg = toy
    record = evaluate(model, tokenizer, rows, cfg, "base-0shot", limit=5, folder=tmp_path, progress=False)
    path = tmp_path / f"{record['name']}.predictions.jsonl"
    newer = ("numeric", "extracted_numeric", "class", "slip_step", "gold_steps", "gold_length", "sample")
    old = [without(a, *newer) for a in read_predictions(record, tmp_path)]
    old[2]["text"] = f"x\n#### {old[2]['gold']}"
    text = "".join(json.dumps(a) + "\n" for a in old)
    path.write_text(text)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    protocol = record["protocol"] | {"grader": "an older version", "fingerprint": "stale"}
    old_record = without(record, "classes", "samples", "sampled") | {"predictions_sha256": sha256, "protocol": protocol}
    write_json(tmp_path / f"{record['name']}.json", old_record)
    again = regrade(record["name"], rows, tmp_path)
    assert again["accuracy"]["strict"]["k"] == again["accuracy"]["numeric"]["k"] == record["accuracy"]["strict"]["k"] + 1
    assert sum(again["classes"].values()) == 5 and complete_result(tmp_path, record["name"]) == again
    assert again["protocol"]["grader"] == grader_versions() and read_predictions(again, tmp_path)[2]["class"] == "right"
    assert again["protocol"]["fingerprint"] == record["protocol"]["fingerprint"], "the next evaluation finds it complete"
    with monkeypatch.context() as m:
        m.setattr(module, "generate", lambda *args, **kwargs: 1 / 0)
        assert evaluate(model, tokenizer, rows, cfg, "base-0shot", limit=5, folder=tmp_path, progress=False) == again
    path.write_text(text.replace("x", "y", 1))
    with pytest.raises(EvaluationError, match="are not the ones"): regrade(record["name"], rows, tmp_path)


@pytest.mark.parametrize("stale", [{"grader": "an older version"}, {"fingerprint": "stale"}])
def test_an_old_grader_or_a_stale_fingerprint_asks_nothing_again(stale, tmp_path, toy, monkeypatch):
    model, tokenizer, rows, cfg = toy
    ask = lambda: evaluate(model, tokenizer, rows, cfg, "base-0shot", limit=5, folder=tmp_path, progress=False)
    record = ask()
    old = record["protocol"] | stale
    if "grader" in stale: old["fingerprint"] = protocol_fingerprint(old)
    write_json(tmp_path / f"{record['name']}.json", record | {"protocol": old})
    monkeypatch.setattr(module, "generate", lambda *args, **kwargs: 1 / 0)
    assert ask() == ask() == record and not (tmp_path / "previous").exists()


RECORD_KEYS = """schema_version name status configuration split model_type base_model dataset n accuracy protocol
    tokens_per_second seconds new_tokens peak_memory finish_reasons environment""".split()
PROTOCOL_KEYS = """prompt shots prompt_style renderer max_new_tokens stop_tokens grader dtype batch_size seeds
    model_fingerprint data_fingerprint decoding fingerprint""".split()
ANSWER_KEYS = """id question sample gold prompt text n_tokens finish_reason
    strict numeric flexible class slip_step gold_steps seconds""".split()


def test_record_and_predictions(tmp_path, toy):
    model, tokenizer, rows, cfg = toy
    record = evaluate(model, tokenizer, rows, cfg, "base-1shot", 1, limit=5, folder=tmp_path, progress=False)
    for key in RECORD_KEYS: assert key in record, key
    for key in PROTOCOL_KEYS: assert key in record["protocol"], key
    assert cfg.one_shot_example.question in record["protocol"]["prompt"] and rows[0]["question"] in record["protocol"]["prompt"]
    answers = read_predictions(record, tmp_path)
    assert [a["id"] for a in answers] == rows["id"][:5]
    assert sum(a["n_tokens"] for a in answers) == record["new_tokens"]
    for a in answers: assert set(ANSWER_KEYS) <= set(a)
    assert show_answers(record, folder=tmp_path).data.count("<tr>") == 6


def test_html_is_escaped():
    answer = {"id": "x", "question": "<b>?", "text": "<script>", "gold": "18", "finish_reason": "stop", "strict": True}
    assert "<script>" not in show_answers([answer]).data


def test_wilson_against_its_formula():
    for k, n in ((0, 10), (10, 10), (3, 10), (91, 1319)):
        z, p = 1.959963984540054, k / n
        middle, half = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5
        assert wilson_interval(k, n) == pytest.approx((max(middle - half, 0), min(middle + half, 1)), abs=1e-12)


def test_quick_accuracy_changes_nothing(toy):
    model, tokenizer, _, cfg = toy
    rows, state = load_gsm8k(cfg, splits=["validation"])["validation"], torch.get_rng_state()
    quick = quick_accuracy(model.train(), tokenizer, rows.select(range(3)), cfg)
    assert model.training and torch.equal(torch.get_rng_state(), state) and not list(project_root().glob("*.partial.jsonl"))
    assert set(quick) == {"n", "strict", "numeric", "flexible", "finished"} and quick["n"] == 3
    model.eval()


def test_a_tuned_run(tmp_path, toy):
    model, tokenizer, rows, cfg = toy
    run = tmp_path / "toy" / cfg.run_name
    save_config(cfg, run)
    model.save_pretrained(run / "model"), tokenizer.save_pretrained(run / "model")
    [record] = evaluate_run(run, limit=5, folder=tmp_path / "out", progress=False)
    assert record["model_type"] == "full" and record["configuration"]["run_name"] == cfg.run_name
    assert record["name"] == result_name(cfg, "full", 5)
    base = evaluate(model, tokenizer, rows, cfg, "base-0shot", limit=5, folder=tmp_path / "out", progress=False)
    assert content(tmp_path / "out", record["name"]) == content(tmp_path / "out", base["name"])
    with pytest.raises(ValueError, match="would change how"): evaluate_run(run, overrides="model.name=other", folder=tmp_path)
    assert evaluate_run(run, split="validation", limit=2, folder=tmp_path, progress=False)[0]["split"] == "validation"
    for given in ({"run": str(run)}, {"preset": "toy"}):
        with pytest.raises(SystemExit, match="leave one out"): module.main(**given, split="test", overrides="evaluation.split=validation")
    aside = run.rename(run.with_name(f"{run.name}.previous"))
    assert cfg.run_name + ".previous__" in evaluate_run(aside, limit=2, folder=tmp_path, progress=False)[0]["name"]


def test_a_run_trained_anew_has_the_name_and_the_old_result_is_kept(tmp_path, toy):
    model, tokenizer, rows, cfg = toy
    model, run = load_model(cfg, dtype="fp32"), tmp_path / "full_main-s0"
    save_config(cfg, run)
    ask = lambda **k: evaluate(model, tokenizer, rows, cfg, "full", limit=2, run=run, folder=tmp_path / "out", progress=False, **k)
    first = ask()
    with torch.no_grad(): model.model.norm.weight[0] += 1
    second, third = ask(), ask(again=True)
    kept = [json.loads(p.read_text()) for p in sorted((tmp_path / "out" / "previous").glob("*.json"))]
    assert first["name"] == second["name"] == third["name"] and sorted(map(str, kept)) == sorted(map(str, [first, second]))
    ask(again=True)
    assert len([*(tmp_path / "out" / "previous").glob("*.json")]) == 3, "nothing that was set aside is overwritten"


# Problems that a run was trained on

@pytest.fixture
def run(tmp_path, toy):
    model, tokenizer, _, cfg = toy
    save_config(cfg, tmp_path / "full_main-s0")
    model.save_pretrained(tmp_path / "full_main-s0" / "model"), tokenizer.save_pretrained(tmp_path / "full_main-s0" / "model")
    return tmp_path / "full_main-s0"

@pytest.mark.parametrize("change", ["data.validation_seed=1", "data.validation_fraction=0.5",
                                    "data.dataset=socratic data.validation_seed=2"])
def test_problems_of_training_are_no_validation(run, change):
    with pytest.raises(EvaluationError, match="was trained on [0-9]+ of the [0-9]+ problems asked, [a-z-]+/train/[0-9]+ among"):
        evaluate_run(run, "validation", overrides=change, folder=run.parent)
    other = "data.dataset=socratic evaluation.max_new_tokens=4"
    assert evaluate_run(run, "validation", 1, other, folder=run.parent, progress=False)[0]["n"] == 1

def test_a_trained_model_asked_as_a_base_model_was_trained_all_the_same(run):
    cfg = load_config("toy", overrides=f"model.path={run / 'model'} evaluation.split=validation data.validation_seed=1")
    with pytest.raises(EvaluationError, match="was trained on"): evaluate_base(cfg, [0], folder=run.parent)

def test_a_run_that_went_on_from_another_run_was_trained_on_both(run, tmp_path, toy):
    *_, rows, cfg = toy
    keep_trained(run, rows.select([0]))
    second = load_config("toy", overrides=f"model.path={run / 'model'}")
    save_config(second, tmp_path / "second")
    with pytest.raises(EvaluationError, match="full_main-s0: was trained on 1 of"):
        evaluate(None, None, rows, second, "full", run=tmp_path / "second", folder=tmp_path / "out")

def test_a_run_knows_its_questions_whatever_became_of_the_data(run, toy):
    *_, rows, cfg = toy
    write_json(run / "record.json", {"data": {"fingerprint": "of another folder"}})
    with pytest.raises(EvaluationError, match="nobody can say what it was trained on"): refuse_trained(rows, run)
    asked = rows.select([3, 4])
    keep_trained(run, asked.map(lambda r: {"question": f" {r['question'].upper()} "}))
    refuse_trained(rows.select([1, 2]), run)
    with pytest.raises(EvaluationError, match="was trained on 2 of the 3"): refuse_trained(rows.select([2, 3, 4]), run)
    assert refuse_trained(load_gsm8k(cfg, splits=["validation"])["validation"], run) is None

def test_examples_are_never_asked(toy):
    _, _, rows, cfg = toy
    train = load_gsm8k(cfg, splits=["train"])["train"]
    drawn = shot_examples(cfg, 8, rows)
    other = train.filter(lambda r: r["question"] in {e["question"] for e in drawn})
    other = other.map(lambda r: {"question": r["question"].upper() + "\n"})
    again = shot_examples(cfg, 8, other)
    assert not {question_key(e["question"]) for e in again} & set(map(question_key, other["question"]))


# What stops an evaluation

def test_a_folder_that_cannot_be_written_is_noticed_first(tmp_path, run, monkeypatch):
    (tmp_path / "file").write_text("")
    for name in ("load_tuned", "load_model"): monkeypatch.setattr(module, name, lambda *args, **kwargs: 1 / 0)
    for ask in (lambda folder: evaluate_run(run, folder=folder), lambda folder: evaluate_base(load_config("toy"), folder=folder)):
        with pytest.raises(EvaluationError, match="results can't be written here"): ask(tmp_path / "file" / "eval_results")
    none = load_config("toy", overrides="evaluation.shots=[]")
    with pytest.raises(EvaluationError, match="asks nothing"): evaluate_base(none, folder=tmp_path)

@pytest.mark.parametrize("line", [b"[1, 2]", b"7", b'"x"', b"\x00", b"\xff", b"[" * 100_000, b'{"id": ' + b"9" * 5000 + b"}"], ids=range(7))
def test_a_damaged_line_of_answers_is_named(tmp_path, toy, line):
    model, tokenizer, rows, cfg = toy
    name = result_name(cfg, "base-0shot", 6)
    (tmp_path / f"{name}.partial.jsonl").write_bytes(b'{"protocol": "x"}\n' + line + b"\n{}\n")
    with pytest.raises(EvaluationError, match=r"partial.jsonl, line 2: not valid JSON; delete"):
        evaluate(model, tokenizer, rows, cfg, "base-0shot", limit=6, folder=tmp_path)

def test_another_tool_s_config_is_no_run(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {hidden: 64}\n")
    with pytest.raises(EvaluationError, match="no config.yaml here that a run wrote"): find_run(tmp_path)


def test_command_line(tmp_path, start):
    def ask(*args): return finish(start("evaluate", *args, GSM8K_SFT_PATHS_EVAL_RESULTS=str(tmp_path)))
    for says, args in {"name either --preset": [], "no config.yaml here": ["--run", str(tmp_path)]}.items():
        code, said = ask(*args)
        assert code == 1 and says in said and "Traceback" not in said
    code, said = ask("--preset", "toy", "--limit", "4", "--shots", "1", "--overrides", BRIEF, "--split", "validation")
    assert code == 0 and "toy__validation-first4__base-1shot-16new__toy__main: strict" in said, said
    assert (tmp_path / "toy__validation-first4__base-1shot-16new__toy__main.json").exists()
