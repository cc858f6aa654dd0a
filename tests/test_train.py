"Training as it is used: killed and resumed, stopped, diverging, reported, and run by papermill"
import fcntl, gc, os, re, signal, subprocess, sys, time, weakref
import pytest
import torch
from commands import finish
from safetensors.torch import load_file
from gsm8k_sft.core.config import load_config, project_path, project_root
from gsm8k_sft.core.runs import read_json, run_folder, write_json
from gsm8k_sft.data.datasets import load_gsm8k
from gsm8k_sft.data.problems import DataError
from gsm8k_sft.generation.sampling import GenerationError
from gsm8k_sft.models.sources import ModelError
from gsm8k_sft.reporting.logs import read_log
from gsm8k_sft.train import train
from gsm8k_sft.training.checkpoints import TrainingError, TrainingInterrupted, lock_run
from gsm8k_sft.training.trainer import GSM8KTrainer, save_weights

SMALL = ("data.train_samples=24 data.test_samples=8 train.per_device_train_batch_size=2 train.gradient_accumulation_steps=2 "
         "train.num_train_epochs=3 train.eval_steps=0 train.save_steps=4 evaluation.max_new_tokens=8 evaluation.batch_size=8")


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    "Each test has runs and results of its own"
    for key in ("runs", "eval_results"): monkeypatch.setenv(f"GSM8K_SFT_PATHS_{key}".upper(), str(tmp_path / key))


def weights(folder):
    files = sorted([*folder.glob("model/*.safetensors"), *folder.glob("adapter/*.safetensors")])
    return {k: v for f in files for k, v in load_file(f).items()}


def same(a, b):
    assert a.keys() == b.keys() and a
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def training(start):
    "Starts `python -m gsm8k_sft.train` with a method and overrides"
    return lambda tuning, overrides: start("train", "--tuning", tuning, "--overrides", overrides, "--no-evaluate")


def wait_for_step(folder, step, process, seconds=300):
    "Until the log of the run has reached `step`"
    until, log = time.time() + seconds, folder / "log.jsonl"
    while time.time() < until and process.is_alive():
        if log.exists() and log.read_text().count("\n") >= step: return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.said.read_text()}")


@pytest.mark.parametrize("tuning,order", [
    ("lora", "random"), pytest.param("full", "group_by_length", marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_unbroken(tuning, order, tmp_path, monkeypatch, training):
    "SIGKILL in the second epoch, with dropout and accumulation; weights and losses are the same bit for bit"
    overrides = f"{SMALL} train.train_sampling_strategy={order} lora_config.lora_dropout=0.1"
    cfg = load_config("toy", tuning, overrides=overrides)
    first = training(tuning, overrides)
    wait_for_step(run_folder(cfg), 9, first)
    first.kill(), first.join()
    assert read_json(run_folder(cfg) / "record.json")["status"] == "running"
    _, out = finish(training(tuning, overrides))
    assert re.search(r"going on from .*checkpoint-(8|12|16)", out), out # whichever was whole when the kill came
    resumed, losses = weights(run_folder(cfg)), [r["loss"] for r in read_log(run_folder(cfg) / "log.jsonl")]
    monkeypatch.setenv("GSM8K_SFT_PATHS_RUNS", str(tmp_path / "unbroken"))
    code, whole = finish(training(tuning, overrides))
    assert "going on" not in whole and code == 0
    assert same(resumed, weights(run_folder(cfg)))
    assert losses == [r["loss"] for r in read_log(run_folder(cfg) / "log.jsonl")] and len(losses) == 18
    assert [s["from_step"] for s in read_json(tmp_path / "runs" / "toy" / cfg.run_name / "record.json")["sessions"]][0] == 0
    kept = [read_json(tmp_path / place / "toy" / cfg.run_name / "trained_on.json")["questions"] for place in ("runs", "unbroken")]
    assert kept[0] == kept[1] and len(set(kept[0])) == 24, "what a run was trained on is known, resumed or not"


def test_sigterm_leaves_a_checkpoint_and_says_how_to_go_on(training):
    cfg = load_config("toy", "lora", overrides=SMALL)
    process = training("lora", SMALL)
    wait_for_step(run_folder(cfg), 3, process)
    process.terminate()
    code, out = finish(process)
    record = read_json(run_folder(cfg) / "record.json")
    assert code == 130 and record["status"] == "interrupted", out
    assert (run_folder(cfg) / f"checkpoint-{record['steps']}" / "trainer_state.json").exists()
    assert "The same command goes on from there" in out
    assert train(cfg, evaluate=False)["steps"] == 18


def test_trained_and_not_yet_evaluated(monkeypatch, capsys):
    "After the last step there is no checkpoint; a run whose evaluation was stopped goes on with the evaluation"
    few = "train.max_steps=4 train.save_steps=2 data.test_samples=4 evaluation.max_new_tokens=4"
    cfg = load_config("toy", "lora", overrides=f"{SMALL} {few}")
    def stop(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr("gsm8k_sft.train.evaluate_run", stop)
        train(cfg)
    folder = run_folder(cfg)
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    before, log = weights(folder), (folder / "log.jsonl").read_text()
    cfg.evaluation.max_new_tokens = 6
    record = train(cfg)
    assert "going on with the evaluation" in capsys.readouterr().out
    assert record["status"] == "complete" and [s["from_step"] for s in record["sessions"]] == [0, 4]
    assert "6new" in record["evaluations"][0], "by the evaluation's settings of now"
    assert set(record["seconds"]) >= {"loading", "training", "evaluation"}, "of both processes"
    assert same(before, weights(folder)) and (folder / "log.jsonl").read_text() == log and not [*folder.glob("checkpoint-*")]


def test_nan_stops_at_its_step():
    cfg = load_config(overrides=f"{SMALL} train.learning_rate=1e30 train.lr_scheduler_kwargs.min_lr=0 train.warmup_steps=0")
    with pytest.raises(TrainingError, match=r"is (nan|inf) at step \d"): train(cfg, evaluate=False)
    record = read_json(run_folder(cfg) / "record.json")
    assert record["status"] == "failed" and "smaller train.learning_rate" in record["error"]
    assert not (run_folder(cfg) / "model").exists()


@pytest.mark.parametrize("told", [True, False])
def test_accumulation_does_not_scale_the_step(told, monkeypatch):
    "One batch of 8 and 8 batches of 1 take the same step, of a model that isn't told of the step's tokens, too (Gemma 4)"
    monkeypatch.setattr("transformers.Gemma3ForCausalLM.accepts_loss_kwargs", told, raising=False)
    finals = []
    for batch, accumulation in ((8, 1), (1, 8)):
        sizes = [f"train.per_device_train_batch_size={batch}", f"train.gradient_accumulation_steps={accumulation}"]
        cfg = load_config(overrides=[*SMALL.split(), *sizes, "train.max_steps=2"])
        train(cfg, evaluate=False)
        finals.append((weights(run_folder(cfg)), [r["loss"] for r in read_log(run_folder(cfg) / "log.jsonl")]))
    assert finals[0][1] == pytest.approx(finals[1][1], rel=1e-4)
    for key, value in finals[0][0].items(): torch.testing.assert_close(value, finals[1][0][key], rtol=1e-3, atol=2e-4)


def test_lora_with_checkpointing_takes_the_same_steps():
    finals = []
    for checkpointing in ("true", "false"):
        changes = f"train.max_steps=3 lora_config.lora_dropout=0 train.gradient_checkpointing={checkpointing}"
        cfg = load_config("toy", "lora", overrides=f"{SMALL} {changes}")
        train(cfg, evaluate=False)
        finals.append(weights(run_folder(cfg)))
    assert any(v.any() for k, v in finals[0].items() if "lora_B" in k)
    for key, value in finals[0].items(): torch.testing.assert_close(value, finals[1][key], rtol=1e-4, atol=1e-6)


def test_schedule_ends_at_min_lr():
    cfg = load_config(overrides=f"{SMALL} train.lr_scheduler_kwargs.min_lr=3e-4")
    train(cfg, evaluate=False)
    rates = [r["learning_rate"] for r in read_log(run_folder(cfg) / "log.jsonl")]
    assert max(rates) == pytest.approx(cfg.train.learning_rate, rel=0.05)
    assert rates[-1] == pytest.approx(3e-4, rel=0.1) and min(rates[1:]) >= 3e-4


def test_a_complete_run_is_kept_or_reused():
    cfg = load_config("toy", "lora", overrides=f"{SMALL} train.max_steps=2")
    train(cfg, evaluate=False)
    stamp = (run_folder(cfg) / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    cfg.train.when_done = "reuse"
    assert train(cfg, evaluate=False)["status"] == "complete"
    assert (run_folder(cfg) / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    cfg.train.when_done = "restart"
    train(cfg, evaluate=False)
    previous = run_folder(cfg).with_name(run_folder(cfg).name + ".previous")
    assert same(weights(previous), weights(run_folder(cfg)))
    train(cfg, evaluate=False)
    assert run_folder(cfg).with_name(run_folder(cfg).name + ".2.previous").is_dir() and previous.is_dir()


def test_test_sets_are_asked_for_once_and_only_to_be_asked(tmp_path, monkeypatch, capsys):
    "A missing one, no model, no key: refused before anything is touched or announced, not where a complete run is only reused"
    cfg = load_config("toy", overrides=f"{SMALL} train.max_steps=1 train.warmup_steps=0 run_name=mine evaluation.max_new_tokens=2 "
                                       "evaluation.other_texts=0")
    loaded = []
    monkeypatch.setattr("gsm8k_sft.data.datasets.load_gsm8k", lambda c, splits=None: loaded.append(splits) or load_gsm8k(c, splits))
    record = train(cfg)
    assert loaded == [["test"]] and len(record["evaluations"]) == 1
    missing = load_config("toy", overrides=f"{SMALL} train.max_steps=1 train.warmup_steps=0 run_name=mine evaluation.datasets=[svamp]")
    monkeypatch.setenv("GSM8K_SFT_PATHS_DATA", str(tmp_path / "none"))
    before = sorted(run_folder(cfg).parent.rglob("*"))
    with pytest.raises(DataError, match="svamp"): train(missing)
    assert sorted(run_folder(cfg).parent.rglob("*")) == before
    capsys.readouterr()
    (tmp_path / "no-model").mkdir()
    broken, told = (load_config("toy", overrides=f"{SMALL} run_name=mine {change}")
                    for change in (f"model.path={tmp_path}/no-model", "train.report_to=wandb"))
    for name, value in {"WANDB_MODE": "online", "WANDB_API_KEY": "", "NETRC": f"{tmp_path}/none"}.items(): monkeypatch.setenv(name, value)
    with pytest.raises(ModelError, match="no config.json"): train(broken, evaluate=False)
    with pytest.raises(TrainingError, match="there is no key"): train(told, evaluate=False)
    assert sorted(run_folder(cfg).parent.rglob("*")) == before and "written to" not in capsys.readouterr().out
    missing.train.when_done = "reuse"
    assert train(missing)["status"] == "complete"


def test_a_killed_run_with_other_settings_is_kept(training):
    "Checkpoints and log of a run that was killed, when the same name is used with another learning rate"
    first, second = (load_config("toy", "lora", overrides=f"{SMALL} run_name=mine train.learning_rate={rate}") for rate in (1e-3, 2e-3))
    process = training("lora", f"{SMALL} run_name=mine train.learning_rate=1e-3")
    wait_for_step(run_folder(first), 6, process)
    process.kill(), process.join()
    steps = len(read_log(run_folder(first) / "log.jsonl"))
    second.train.max_steps = 2
    assert train(second, evaluate=False)["steps"] == 2
    kept = run_folder(first).with_name("mine.previous")
    assert len(read_log(kept / "log.jsonl")) == steps and any(kept.glob("checkpoint-*"))


def test_two_processes_cannot_own_one_folder(training):
    cfg = load_config("toy", "lora", overrides=SMALL)
    with lock_run(run_folder(cfg)):
        _, out = finish(training("lora", SMALL))
        assert f"belongs to process {os.getpid()}" in out and "run_name=" in out and "Traceback" not in out
    assert not run_folder(cfg).parent.exists(), "a run that is refused leaves nothing"


def test_a_lock_that_its_owner_removes_meanwhile_is_not_taken(tmp_path, monkeypatch):
    "Else a third process could make the file anew and own the folder too"
    lock, path = fcntl.flock, tmp_path / "runs" / "toy" / ".mine.lock"
    def late(file, how):
        path.unlink()
        lock(file, how)
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        with pytest.raises(TrainingError, match="belongs to"), lock_run(tmp_path / "runs" / "toy" / "mine"): pass
    with lock_run(tmp_path / "runs" / "toy" / "mine"): assert path.exists()
    assert not list(tmp_path.iterdir())


def interrupted(overrides, tuning="lora", step=6):
    "A run of the toy that stopped at a step"
    cfg = load_config("toy", tuning, overrides=f"{SMALL} {overrides}")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingInterrupted):
        passes, training_step = [], GSM8KTrainer.training_step
        def counted(*args):
            passes.append(1)
            if len(passes) == 2 * step: os.kill(os.getpid(), signal.SIGTERM)
            return training_step(*args)
        patch.setattr(GSM8KTrainer, "training_step", counted)
        train(cfg, evaluate=False)
    assert read_json(run_folder(cfg) / "record.json")["status"] == "interrupted"
    return cfg


def test_resume_wants_the_same_examples_and_lists_its_processes(capsys):
    cfg = interrupted("")
    path = run_folder(cfg) / "record.json"
    begun = read_json(path)
    write_json(path, begun | {"data": begun["data"] | {"fingerprint": "0123456789abcdef"}})
    with pytest.raises(TrainingError, match="its training examples were 0123456789ab when it began"): train(cfg, evaluate=False)
    begun["environment"]["packages"]["torch"] = "1.0"
    write_json(path, begun)
    record = train(cfg, evaluate=False)
    assert "going on with other versions: torch 1.0 is now" in capsys.readouterr().out
    assert [s["from_step"] for s in record["sessions"]] == [0, begun["steps"]] and begun["steps"] == 6
    assert all({"started", "git_commit", "packages", "cpu", "gpus"} <= s.keys() for s in record["sessions"])


EARLY = ("train.early_stopping_patience=3 train.eval_steps=2 train.save_steps=2 train.validation_samples=0 train.learning_rate=0.3 "
         "train.warmup_steps=0 train.num_train_epochs=10")


@pytest.mark.slow # quick: the same count in the chapter on callbacks, and the test of the best weights below
def test_early_stopping_records_what_was_saved(tmp_path, monkeypatch):
    "The best evaluation's step and losses, and the same number of steps when the run was cut"
    cut = train(interrupted(EARLY, "full", step=5), evaluate=False)
    monkeypatch.setenv("GSM8K_SFT_PATHS_RUNS", str(tmp_path / "whole"))
    cfg = load_config("toy", "full", overrides=f"{SMALL} {EARLY}")
    record = train(cfg, evaluate=False)
    assert record["steps"] == cut["steps"] < 60 and record["saved_step"] == cut["saved_step"] == record["steps"] - 6
    log = read_log(run_folder(cfg) / "log.jsonl")
    losses = {r["step"]: r["eval_loss"] for r in log if "eval_loss" in r}
    assert record["validation"]["step"] == record["saved_step"] and record["validation"]["eval_loss"] == min(losses.values())
    until = [r["loss"] for r in log if "loss" in r and r["step"] <= record["saved_step"]]
    last = until[-max(1, len(until) // 20):] # the last twentieth of the steps that led to the saved weights
    assert record["final_loss"] == pytest.approx(sum(last) / len(last))


@pytest.mark.parametrize("changes,message", [
    ("train.max_steps=1 train.warmup_steps=1", "nothing was trained"),
    ("train.max_steps=1 train.warmup_steps=0 train.lr_scheduler_type=constant train.lr_scheduler_kwargs.min_lr=null "
     "train.learning_rate=1e38", "weights are not finite after the last step")])
def test_untrained_and_broken_weights_are_not_complete(changes, message):
    cfg = load_config(overrides=f"{SMALL} {changes}")
    with pytest.raises(TrainingError, match=message): train(cfg, evaluate=False)
    assert read_json(run_folder(cfg) / "record.json")["status"] == "failed" and not (run_folder(cfg) / "model").exists()


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_validation_part_without_examples_is_refused_before_the_first_step(packing):
    "Its loss would be 0 / 0 at the first evaluation"
    none = f"data.validation_fraction=0.001 data.max_length=100 train.packing={packing} train.max_steps=2"
    cfg = load_config(overrides=f"{SMALL} {none} train.eval_steps=1")
    with pytest.raises(TrainingError, match="no validation example is left.*train.eval_steps=0"): train(cfg, evaluate=False)
    assert not run_folder(cfg).exists()
    assert train(load_config(overrides=f"{SMALL} {none} train.eval_steps=0"), evaluate=False)["status"] == "complete"


def test_answers_without_room_are_refused_before_the_first_step():
    cfg = load_config(overrides=f"{SMALL} train.max_steps=2 evaluation.max_new_tokens=2040 run_name=no-room")
    with pytest.raises(GenerationError, match=r"2048 positions; set evaluation.max_new_tokens \(infer: .*\) to \d+"): train(cfg)
    assert not (run_folder(cfg) / "record.json").exists()


def test_the_trainer_is_gone_when_the_evaluation_begins(monkeypatch):
    "Optimizer and trained model free their memory first; nobody collects them here"
    alive, found = [], []
    def watched(trainer, *args):
        for o in (trainer, trainer.model, trainer.optimizer.optimizer, next(iter(trainer.optimizer.state))): alive.append(weakref.ref(o))
        return save_weights(trainer, *args)
    def evaluation(folder, asked, tokenizer):
        found.extend(r() is not None for r in alive)
        return [{"name": "none", "dataset": asked[0][0].data.dataset, "split": "test", "accuracy": {}}]
    monkeypatch.setattr("gsm8k_sft.train.save_weights", watched)
    monkeypatch.setattr("gsm8k_sft.train.evaluate_run", evaluation)
    train(load_config("toy", "lora", overrides=f"{SMALL} train.max_steps=2"))
    assert found == [False] * 4


def test_early_stopping_returns_to_the_best():
    cfg = load_config(overrides=f"{SMALL} train.early_stopping_patience=1 train.eval_steps=2 train.save_steps=2 train.validation_samples=4 "
                                "train.learning_rate=1 train.warmup_steps=0 train.num_train_epochs=10")
    record = train(cfg, evaluate=False)
    assert record["steps"] < 60
    assert "eval_accuracy_strict" in record["validation"]


def test_wandb_gets_configuration_and_summary_and_one_run(monkeypatch):
    "Of a resumed run too; names of the environment win. What wandb writes, and when, is its own affair"
    import wandb
    own = {"PROJECT": "mine", "NAME": "try", "RUN_GROUP": "tries", "MODE": "offline"}
    for name, value in own.items(): monkeypatch.setenv(f"WANDB_{name}", value)
    runs, summaries, init, finish = [], [], wandb.init, wandb.Run.finish
    monkeypatch.setattr(wandb, "init", lambda **kwargs: runs.append(init(**kwargs)) or runs[-1])
    monkeypatch.setattr(wandb.Run, "finish", lambda run, *args, **kwargs: (summaries.append(run.summary.get("final_loss")),
                                                                           finish(run, *args, **kwargs))[1])
    record = train(cfg := interrupted("train.report_to=wandb"), evaluate=False)
    first, second = runs
    assert first.id == second.id == (run_folder(cfg) / "wandb_id.txt").read_text()
    assert (second.project, second.name, second.group) == ("mine", "try", "tries")
    assert second.config["tuning_method"] == "lora" and second.config["lora_config"]["r"] == cfg.lora_config.r
    assert summaries == [None, pytest.approx(record["final_loss"])], "the first was interrupted"
    def unreachable(**kwargs): raise wandb.errors.CommError("refused\nafter 90 s")
    monkeypatch.setattr(wandb, "init", unreachable)
    with pytest.raises(TrainingError, match=r"can't be reached \(refused after 90 s\); WANDB_MODE=offline"): train(cfg, evaluate=False)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert train(cfg, evaluate=False)["status"] == "complete"


def papermill(*parameters, output=None):
    notebooks = ["nbs/02_train.ipynb", *([str(output)] if output else [])]
    command = [sys.executable, "-m", "papermill", *notebooks, *parameters, "--no-progress-bar"]
    return subprocess.run(command, cwd=project_root(), capture_output=True, text=True, timeout=300)


def test_papermill_runs_a_variant(tmp_path):
    "Every cell of the chapter, with few steps; `make demo` takes them all"
    out = tmp_path / "lora.ipynb"
    done = papermill("-p", "tuning", "lora", "-p", "overrides", f"{SMALL} train.max_steps=3", output=out)
    assert done.returncode == 0, done.stderr
    record = read_json(next((tmp_path / "runs").glob("toy/lora_main-s0-*/record.json")))
    assert record["status"] == "complete" and record["steps"] == 3
    text = out.read_text()
    assert "image/png" in text and len(re.findall(r"the run is written to [^{]", text)) == 1, "nothing else is trained"


@pytest.mark.slow # quick: tests/faults, by the command; a parameter that there is not, in the chapter on configurations
@pytest.mark.parametrize("name,value,says", [("tunning", "lora", "Did you mean 'tuning'"), ("tuning", "lorra", "full, lora, qlora"),
                                             ("overrides", "train.learning_rat=1", "train.learning_rate")])
def test_papermill_stops_early_at_a_wrong_parameter(name, value, says, tmp_path):
    done = papermill("-p", name, value, output=tmp_path / "out.ipynb")
    assert done.returncode != 0 and says in done.stderr
    assert not (tmp_path / "runs").exists(), "nothing has begun"


def test_more_other_texts_than_there_are_is_refused_before_training():
    with pytest.raises(ValueError, match="evaluation.other_texts: 100000 .* texts asked for"):
        train(load_config("toy", overrides="evaluation.other_texts=100000 run_name=texts data.train_samples=8 data.test_samples=2"))
    assert not list(project_path("runs").glob("**/texts*"))


def test_the_collector_is_on_after_loading_and_after_a_refusal():
    cfg = load_config("toy", overrides="data.max_length=8 run_name=refused")
    with pytest.raises(TrainingError, match="no training example"): train(cfg)
    assert gc.isenabled()


def test_torch_starts_its_compilers_processes_when_asked():
    "`start_compiler` passes over a torch that has no such function"
    from torch._inductor import async_compile
    assert callable(async_compile.maybe_warm_pool)
