"Two processes on the CPU (gloo) against one: the same steps, losses and weights"
import json, os, subprocess, sys
from functools import cache
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from transformers import TrainingArguments
from gsm8k_sft.core.config import ConfigError, load_config
from gsm8k_sft.evaluate import evaluate_base
from gsm8k_sft.models.adapters import load_tuned
from gsm8k_sft.models.loading import load_model
from gsm8k_sft.train import train
from gsm8k_sft.training import trainer
from gsm8k_sft.training.graphs import compiled_layers, training_mode
from gsm8k_sft.training.loss import packed_loss
from gsm8k_sft.training.packing import PackedCollator
from gsm8k_sft.training.trainer import training_arguments

ACCELERATE = files("gsm8k_sft") / "configs" / "accelerate"
SMALL = ("data.train_samples=49 data.test_samples=8 data.validation_fraction=0.0089 train.num_train_epochs=1 train.eval_steps=4 "
         "train.save_steps=1000 "
         "evaluation.max_new_tokens=8 train.validation_samples=0 train.optim=adamw_torch lora_config.lora_dropout=0 "
         "train.learning_rate=1e-3 model.precision=fp32")

# Accelerate shards over GPUs only: on a CPU it would quietly do DDP. While it decides, the gloo processes pass for GPU ones.
POSING = """
from accelerate.state import AcceleratorState, PartialState
init = AcceleratorState.__init__
def posing(self, *args, **kwargs):
    PartialState(cpu=True)
    if PartialState._shared_state["distributed_type"] == "MULTI_CPU": PartialState._shared_state["distributed_type"] = "MULTI_GPU"
    init(self, *args, **kwargs)
AcceleratorState.__init__ = posing
from safetensors.torch import load_file
from gsm8k_sft import train
save = train.save_weights
def checked(trainer, *args):
    whole = {n: p.full_tensor() for n, p in trainer.model.named_parameters()} # fails where nothing is sharded
    saved = load_file(save(trainer, *args) / "model.safetensors")
    assert saved.keys() == whole.keys() and all(saved[n].equal(p) for n, p in whole.items()), "gathered, and tied weights once"
train.save_weights = checked
"""

END = """
import os, sys
sys.stdout.flush()
os._exit(0) # FSDP keeps threads of gloo, which would abort the end; on GPUs there are none
"""

SHARDED = POSING + """
from gsm8k_sft.evaluate import evaluate_base
load = train.load_for_training
def evaluated(cfg): # the base model is asked first, as a model of its own
    evaluate_base(cfg, [0], 2)
    return load(cfg)
train.load_for_training = evaluated
train.main()
""" + END


# Two processes answer the toy's problems, find them answered, and go on where seven were left by one that was interrupted. Then one
# evaluates alone, and both train two steps with weights that are shared out.
EVALUATED = POSING + """
import glob, json, torch.distributed as dist
from pathlib import Path
from gsm8k_sft.core import runs
from gsm8k_sft.core.config import load_config, project_path
from gsm8k_sft.evaluate import _together, evaluate_base
cfg = load_config("toy", overrides=OVERRIDES, training=False)
with _together() as state:
    found = evaluate_base(cfg, [0, 1], 21)
    assert evaluate_base(cfg, [0, 1], 21, again=False) == found
    name = found[0]["name"]
    whole, part = (project_path("eval_results") / f"{name}.{end}" for end in ("predictions.jsonl", "partial.jsonl"))
    if state.is_main_process:
        header = json.dumps({"protocol": found[0]["protocol"]["fingerprint"], "name": name})
        part.write_text("\\n".join([header, *whole.read_text().splitlines()[5:12]]) + "\\n")
        whole.rename(whole.with_name("first.jsonl"))
        whole.with_name(f"{name}.json").unlink()
    dist.barrier()
    resumed, all_found = evaluate_base(cfg, [0], 21)[0], [None, None]
    assert (resumed["resumed_answers"], resumed["accuracy"]) == (7, found[0]["accuracy"])
    dist.all_gather_object(all_found, [*found, resumed])
    assert all_found[0] == all_found[1]
    if state.is_main_process:
        runs._PATIENCE = 1
        try: evaluate_base(cfg, [0], 21)
        except TimeoutError as e: print(e)
assert not [p for p in glob.glob("/proc/self/task/*/comm") if "gloo" in open(p).read()], "threads that outlive the group abort the end"
runs._PATIENCE, rank = 600, state.process_index
PartialState._reset_state()
dist.init_process_group("gloo", store=dist.FileStore(str(project_path("runs", "store")), 2), rank=rank, world_size=2)
train.train(load_config("toy", overrides=TRAINED), evaluate=False)
""" + END


# The second of two processes gets a signal in its third step; the first knows nothing of it.
SIGNALLED = """
import os, signal
from gsm8k_sft import train
build = train.build_trainer
def signalled(*args):
    trainer, log, signals = build(*args)
    def begin(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 2: os.kill(os.getpid(), signal.SIGTERM)
    type(signals).on_step_begin = begin
    return trainer, log, signals
train.build_trainer = signalled
train.main()
"""


def settings(folder, batch, packing):
    "Overrides of a small run, and variables that keep its files apart"
    overrides = f"{SMALL} train.per_device_train_batch_size={batch} train.packing={packing} train.max_tokens=300 run_name=run"
    return overrides, {f"GSM8K_SFT_PATHS_{k}": str(folder / k.lower()) for k in ("RUNS", "CACHE", "EVAL_RESULTS")}


def launched(folder, tuning, packing, how="ddp", script=None, gpus=""):
    "What two processes that Accelerate starts have left, when they have ended: our training, or a script that calls it"
    overrides, own = settings(folder, 4, packing)
    if script: (folder / "script.py").write_text(script)
    program = [str(folder / "script.py")] if script else ["-m", "gsm8k_sft.train"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE / f"{how}.yaml"), "--num_processes", "2",
               *program, "--preset", "toy", "--tuning", tuning, "--overrides", overrides]
    own |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpus}
    return subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=600)


def outcome(folder):
    "Log, weights and record of the run"
    run = folder / "runs" / "toy" / "run"
    log, record = [json.loads(l) for l in (run / "log.jsonl").read_text().splitlines()], json.loads((run / "record.json").read_text())
    for name in record["evaluations"]:
        result = json.loads((folder / "eval_results" / f"{name}.json").read_text())
        assert (result["n"], result["processes"]) == (8, record["processes"])
    return log, load_file(next(run.glob("*/*model.safetensors"))), record


@cache
def alone(tuning, packing):
    "The same by one process, this one"
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        overrides, own = settings(Path(folder), 8, packing)
        for key, value in own.items(): patch.setenv(key, value)
        train(load_config("toy", tuning, overrides=overrides), evaluate=False)
        return outcome(Path(folder))


def check_equal(two, one):
    "Two processes took the steps of one"
    (log_two, two, record), (log_one, one, _) = two, one
    losses = [[r["eval_loss"] for r in log if "eval_loss" in r] for log in (log_one, log_two)] # of 25 problems: the last is one for two
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-3)
    log_one, log_two = ([r for r in log if "loss" in r] for log in (log_one, log_two))
    assert record["processes"] == 2 and len(record["evaluations"]) == 1
    assert [r["step"] for r in log_one] == [r["step"] for r in log_two] == list(range(1, 8)) # in the last one example for two processes
    assert [r["tokens"] for r in log_one] == [r["tokens"] for r in log_two]
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [r[key] for r in log_two] == pytest.approx([r[key] for r in log_one], rel=1e-3)
    assert two.keys() == one.keys()
    for n, w in one.items(): assert float((two[n] - w).norm() / w.norm().clamp(min=1e-9)) < 1e-3, n


@pytest.mark.parametrize("tuning,packing,how", [
    pytest.param(*grid, marks=pytest.mark.slow) for grid in (("full", True, "fsdp2"), ("full", True, "ddp"), ("lora", False, "ddp"))])
def test_two_processes_are_one(tuning, packing, how, tmp_path):
    done = launched(tmp_path, tuning, packing, how, SHARDED if how == "fsdp2" else None)
    assert done.returncode == 0, done.stderr[-3000:]
    check_equal(outcome(tmp_path), alone(tuning, packing))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("tuning,how", [("full", "ddp"), ("lora", "ddp"), ("full", "fsdp2")])
def test_two_gpus_are_one(tuning, how, tmp_path):
    done = launched(tmp_path, tuning, True, how, gpus="0,1")
    assert done.returncode == 0, done.stderr[-3000:]
    check_equal(outcome(tmp_path), alone(tuning, True))


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    "And the same command ends where one process does that nobody disturbed"
    done, run = launched(tmp_path, "full", True, script=SIGNALLED), tmp_path / "runs" / "toy" / "run"
    record = json.loads((run / "record.json").read_text())
    assert done.returncode != 0 and (record["status"], record["steps"]) == ("interrupted", 3), done.stderr[-3000:]
    assert "SIGTERM at step 3 of 7" in done.stderr and (run / "checkpoint-3" / "trainer_state.json").exists()
    assert len(list((run / "checkpoint-3").glob("rng_state*.pth"))) == 2, "both processes saved theirs"
    done = launched(tmp_path, "full", True)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((run / "record.json").read_text())
    assert (record["status"], record["steps"], [s["from_step"] for s in record["sessions"]]) == ("complete", 7, [0, 3])
    check_equal(outcome(tmp_path), alone("full", True))


@pytest.mark.slow
def test_ddp_leaves_compiled_layers_whole(tmp_path, monkeypatch):
    "Buckets smaller than a layer's weights don't cut its graph in pieces, which would keep more for the backward pass"
    made, dist = [], torch.distributed
    def counted(graph, inputs): return made.append(graph) or graph.forward
    monkeypatch.setattr(trainer, "compiled_layers", lambda model: compiled_layers(model, counted))
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 100_000)
    cfg = load_config("toy", overrides="train.packing=true train.speedup=compile train.report_to=none train.eval_steps=0",
                      training=False) # compiling is refused without a GPU
    model, chunk = load_model(cfg, training=True), {"input_ids": torch.arange(5, 60), "labels": torch.arange(5, 60)}
    built, chunk = trainer.GSM8KTrainer(cfg, model=model, args=training_arguments(cfg, tmp_path)), PackedCollator(100)([chunk])["chunks"][0]
    def graphs(wrapped):
        torch._dynamo.reset()
        made.clear()
        with training_mode(model, built.compiled): packed_loss(wrapped, model, chunk).backward()
        return len(made)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try: assert graphs(model) == graphs(torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.2)) > 0
    finally: dist.destroy_process_group()


def answers(path):
    "What was answered, without how long it took and how many were answered together"
    return [{k: v for k, v in json.loads(l).items() if k not in ("seconds", "batch_size")} for l in path.read_text().splitlines()]


def test_two_processes_answer_as_one(tmp_path, monkeypatch):
    "Each question by one of them, the same files and texts as by one process; an interrupted evaluation goes on"
    overrides = "evaluation.max_new_tokens=24 evaluation.batch_size=4 evaluation.save_every=3"
    trained, _ = settings(tmp_path, 4, True)
    trained = f"{trained} train.max_steps=2 train.eval_steps=2 data.max_length=150"
    script = EVALUATED.replace("OVERRIDES", repr(overrides)).replace("TRAINED", repr(trained))
    (tmp_path / "two" / "runs").mkdir(parents=True)
    done = launched(tmp_path / "two", "full", True, "fsdp2", script)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [l for l in done.stdout.splitlines() if "the run is written to" in l or "longer than data.max_length=150 and left out" in l]
    assert len(said) == len(set(said)) == 3, "once each: train, validation, where"
    assert "evaluate: process 1 of 2 (the first is 0) did not call it within 1 s" in done.stdout
    for key, value in settings(tmp_path / "one", 1, False)[1].items(): monkeypatch.setenv(key, value)
    one, two = tmp_path / "one" / "eval_results", tmp_path / "two" / "eval_results"
    for result in evaluate_base(load_config("toy", overrides=overrides, training=False), [0, 1], 21):
        record = json.loads((two / f"{result['name']}.json").read_text())
        assert (record["processes"], record["accuracy"], record["protocol"]) == (2, result["accuracy"], result["protocol"])
        assert answers(two / f"{result['name']}.predictions.jsonl") == answers(one / f"{result['name']}.predictions.jsonl")
    assert not list(two.glob("*.partial.jsonl")), "each is complete"
    load_tuned(tmp_path / "two" / "runs" / "toy" / "run") # plain weights, as one process would have saved them


@pytest.mark.parametrize("name", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "FSDP_VERSION"])
def test_other_ways_to_use_several_gpus_are_refused(name, monkeypatch):
    monkeypatch.setenv(name, "1" if name == "FSDP_VERSION" else "true")
    with pytest.raises(ConfigError, match="accelerate launch: .* not known here; give it --config_file .*ddp.yaml"): load_config()
    load_config(training=False) # a plan may be made


def test_accelerates_own_precision_does_not_count(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    args = training_arguments(load_config(overrides="train.report_to=none"), tmp_path)
    assert args.mixed_precision == "no" and Accelerator(cpu=True).mixed_precision == "no"


def test_one_process_uses_one_of_several_gpus_and_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    args = training_arguments(load_config(overrides="train.report_to=none"), tmp_path)
    assert args._n_gpu == 1, "with two, the Trainer would spread the model over both"
    assert "accelerate launch --num_processes 2 -m gsm8k_sft.train" in capsys.readouterr().out


def test_accelerate_reads_our_files():
    read = {p.name: load_config_from_file(str(p)) for p in ACCELERATE.iterdir()}
    assert {n: (c.distributed_type.value, c.num_processes, c.mixed_precision) for n, c in read.items()} == {
        "one_gpu.yaml": ("NO", 1, "no"), "ddp.yaml": ("MULTI_GPU", 2, "no"), "fsdp2.yaml": ("FSDP", 2, "no")}
