"Training as it is used: killed and resumed, stopped, diverging, reported, and run by papermill"
import json, re, signal, struct, subprocess, sys, time
from pathlib import Path
import pytest
import torch
from safetensors.torch import load_file
from gsm8k_sft.core.config import load_config, project_root
from gsm8k_sft.core.runs import read_json, run_folder
from gsm8k_sft.train import train
from gsm8k_sft.training.callbacks import read_log
from gsm8k_sft.training.trainer import TrainingError

SMALL = ("data.train_samples=48 data.test_samples=8 train.per_device_train_batch_size=4 train.gradient_accumulation_steps=2 "
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


def start(tuning, overrides):
    "`python -m gsm8k_sft.train` in a process of its own"
    command = [sys.executable, "-m", "gsm8k_sft.train", "--tuning", tuning, "--overrides", overrides, "--no-evaluate"]
    return subprocess.Popen(command, cwd=project_root(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(folder, step, process, seconds=300):
    "Until the log of the run has reached `step`"
    until = time.time() + seconds
    while time.time() < until and process.poll() is None:
        log = folder / "log.jsonl"
        if log.exists() and log.read_text().count("\n") >= step: return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0] if process.poll() is not None else 'too slow'}")


@pytest.mark.parametrize("tuning,order", [("lora", "random"), ("full", "group_by_length")])
def test_killed_and_resumed_equals_unbroken(tuning, order, tmp_path, monkeypatch):
    "SIGKILL in the second epoch, with dropout and accumulation; weights and losses are the same bit for bit"
    overrides = f"{SMALL} train.train_sampling_strategy={order} lora_config.lora_dropout=0.1"
    cfg = load_config("toy", tuning, overrides=overrides)
    first = start(tuning, overrides)
    wait_for_step(run_folder(cfg), 10, first)
    first.kill(), first.wait()
    assert read_json(run_folder(cfg) / "record.json")["status"] == "running"
    out, _ = start(tuning, overrides).communicate(timeout=300)
    assert re.search(r"going on from .*checkpoint-(8|12|16)", out), out # whichever was whole when the kill came
    resumed, losses = weights(run_folder(cfg)), [r["loss"] for r in read_log(run_folder(cfg) / "log.jsonl")]
    monkeypatch.setenv("GSM8K_SFT_PATHS_RUNS", str(tmp_path / "unbroken"))
    whole = start(tuning, overrides)
    assert "going on" not in whole.communicate(timeout=300)[0] and whole.returncode == 0
    assert same(resumed, weights(run_folder(cfg)))
    assert losses == [r["loss"] for r in read_log(run_folder(cfg) / "log.jsonl")] and len(losses) == 18


def test_sigterm_leaves_a_checkpoint_and_says_how_to_go_on():
    cfg = load_config("toy", "lora", overrides=SMALL)
    process = start("lora", SMALL)
    wait_for_step(run_folder(cfg), 3, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    record = read_json(run_folder(cfg) / "record.json")
    assert process.returncode == 130 and record["status"] == "interrupted", out
    assert (run_folder(cfg) / f"checkpoint-{record['steps']}" / "trainer_state.json").exists()
    assert "The same command goes on from there" in out
    assert train(cfg, evaluate=False)["steps"] == 18


def test_nan_stops_at_its_step():
    cfg = load_config(overrides=f"{SMALL} train.learning_rate=1e30 train.lr_scheduler_kwargs.min_lr=0 train.warmup_steps=0")
    with pytest.raises(TrainingError, match=r"is (nan|inf) at step \d"): train(cfg, evaluate=False)
    record = read_json(run_folder(cfg) / "record.json")
    assert record["status"] == "failed" and "smaller train.learning_rate" in record["error"]
    assert not (run_folder(cfg) / "model").exists()


def test_accumulation_does_not_scale_the_step():
    "One batch of 8 and 8 batches of 1 take the same step"
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


def test_early_stopping_returns_to_the_best():
    cfg = load_config(overrides=f"{SMALL} train.early_stopping_patience=1 train.eval_steps=2 train.save_steps=2 train.validation_samples=4 "
                                "train.learning_rate=0.3 train.warmup_steps=0 train.num_train_epochs=10")
    record = train(cfg, evaluate=False)
    assert record["steps"] < 60
    assert "eval_accuracy_strict" in record["validation"]


def offline_records(path):
    "The protobuf messages of an offline run: LevelDB's log format, 32 KiB blocks of (crc, length, kind, bytes) behind a header of 7 bytes"
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, message = Path(path).read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7: at += 32768 - at % 32768
        length, kind = struct.unpack("<HB", data[at + 4:at + 7])
        message, at = message + data[at + 7:at + 7 + length], at + 7 + length
        if kind in (1, 4): # a message is whole in one piece (1) or ends here (4)
            yield Record.FromString(message)
            message = b""


def values(items): return [(i.key or "/".join(i.nested_key), json.loads(i.value_json)) for i in items]


def test_wandb_offline_holds_metrics_configuration_and_summary(monkeypatch):
    cfg = load_config("toy", "lora", overrides=f"{SMALL} train.max_steps=3 train.report_to=wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    train(cfg, evaluate=True)
    losses, config, summary = [], {}, {}
    for record in offline_records(next(run_folder(cfg).glob("wandb/offline-run-*/*.wandb"))):
        losses += [value for name, value in values(record.history.item) if name == "train/loss"]
        for part in (record.config, record.run.config): config |= values(part.update)
        summary |= values(record.summary.update)
    record = read_json(run_folder(cfg) / "record.json")
    assert losses == [r["loss"] for r in read_log(run_folder(cfg) / "log.jsonl") if "loss" in r] and len(losses) == 3
    assert config["tuning_method"] == "lora" and config["lora_config"]["r"] == cfg.lora_config.r
    assert summary["final_loss"] == pytest.approx(record["final_loss"]) and "test/accuracy_strict" in summary


def papermill(*parameters, output=None):
    notebooks = ["nbs/02_train.ipynb", *([str(output)] if output else [])]
    command = [sys.executable, "-m", "papermill", *notebooks, *parameters, "--no-progress-bar"]
    return subprocess.run(command, cwd=project_root(), capture_output=True, text=True, timeout=300)


def test_papermill_runs_a_variant(tmp_path):
    out = tmp_path / "lora.ipynb"
    done = papermill("-p", "tuning", "lora", "-p", "overrides", f"{SMALL} train.max_steps=3", output=out)
    assert done.returncode == 0, done.stderr
    record = read_json(next((tmp_path / "runs").glob("toy/lora_main-s0-*/record.json")))
    assert record["status"] == "complete" and record["steps"] == 3
    assert "image/png" in out.read_text()


@pytest.mark.parametrize("parameters,says", [
    (("-p", "tunning", "lora"), "Did you mean 'tuning'"),
    (("-p", "tuning", "lorra"), "full, lora, qlora"),
    (("-p", "overrides", "train.learning_rat=1"), "train.learning_rate")])
def test_papermill_stops_early_at_a_wrong_parameter(parameters, says, tmp_path):
    started = time.time()
    done = papermill(*parameters, output=tmp_path / "out.ipynb")
    assert done.returncode != 0 and says in done.stderr
    assert time.time() - started < 30 and not (tmp_path / "runs").exists()
