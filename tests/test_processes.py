"Two processes on the CPU (gloo) against one: the same steps, losses and weights"
import json, os, subprocess, sys
from importlib.resources import files
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

ACCELERATE = files("gsm8k_sft") / "configs" / "accelerate"
SMALL = ("data.train_samples=48 data.test_samples=8 train.num_train_epochs=1 train.eval_steps=0 train.save_steps=1000 "
         "train.validation_samples=0 train.optim=adamw_torch lora_config.lora_dropout=0 train.learning_rate=1e-3")

# Accelerate shards over GPUs only: on a CPU it would quietly do DDP. While it decides, the gloo processes pass for GPU ones.
SHARDED = """
from accelerate.state import AcceleratorState, PartialState
init = AcceleratorState.__init__
def posing(self, *args, **kwargs):
    PartialState(cpu=True)
    if PartialState._shared_state["distributed_type"] == "MULTI_CPU": PartialState._shared_state["distributed_type"] = "MULTI_GPU"
    init(self, *args, **kwargs)
AcceleratorState.__init__ = posing
from gsm8k_sft import train
def sharded(model): return any(hasattr(p, "full_tensor") for p in model.parameters())
save = train.save_weights
def checked(trainer, *args):
    assert sharded(trainer.model)
    save(trainer, *args)
train.save_weights = checked
train.main()
"""


def program(folder, processes, how):
    "What python starts: the training itself, or as many of it as Accelerate is told to"
    if processes == 1: return ["-m", "gsm8k_sft.train"]
    settings = ["--config_file", str(ACCELERATE / f"{how}.yaml"), "--num_processes", str(processes)]
    started = [str(folder / "sharded.py")] if how == "fsdp2" else ["-m", "gsm8k_sft.train"]
    return ["-m", "accelerate.commands.launch", *settings, *started]


def trained(folder, tuning, processes, batch, packing, how="ddp"):
    "The log and the weights of a run by so many processes"
    name = f"p{processes}"
    (folder / "sharded.py").write_text(SHARDED)
    own = {"GSM8K_SFT_PATHS_RUNS": str(folder / "runs"), "GSM8K_SFT_PATHS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    overrides = f"{SMALL} train.per_device_train_batch_size={batch} train.packing={packing} train.max_tokens=300 run_name={name}"
    asked = ["--preset", "toy", "--tuning", tuning, "--no-evaluate", "--overrides", overrides]
    command = [sys.executable, *program(folder, processes, how), *asked]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    run = folder / "runs" / "toy" / name
    log = [json.loads(l) for l in (run / "log.jsonl").read_text().splitlines()]
    record = json.loads((run / "record.json").read_text())
    assert record["processes"] == processes
    return log, load_file(next(run.glob("*/*model.safetensors")))


@pytest.mark.parametrize("tuning,packing,how", [
    ("full", True, "ddp"), pytest.param("lora", False, "ddp", marks=pytest.mark.slow), ("full", True, "fsdp2")])
def test_two_processes_are_one(tuning, packing, how, tmp_path):
    (log_one, one), (log_two, two) = trained(tmp_path, tuning, 1, 8, packing), trained(tmp_path, tuning, 2, 4, packing, how)
    assert [r["step"] for r in log_one] == [r["step"] for r in log_two] == list(range(1, 7))
    assert [r["tokens"] for r in log_one] == [r["tokens"] for r in log_two]
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [r[key] for r in log_two] == pytest.approx([r[key] for r in log_one], rel=1e-3)
    assert two.keys() == one.keys()
    for n, w in one.items(): assert float((two[n] - w).norm() / w.norm().clamp(min=1e-9)) < 1e-3, n


def test_accelerate_reads_our_files():
    read = {p.name: load_config_from_file(str(p)) for p in ACCELERATE.iterdir()}
    assert {n: (c.distributed_type.value, c.num_processes, c.mixed_precision) for n, c in read.items()} == {
        "one_gpu.yaml": ("NO", 1, "no"), "ddp.yaml": ("MULTI_GPU", 2, "no"), "fsdp2.yaml": ("FSDP", 2, "no")}
