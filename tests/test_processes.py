"Two processes on the CPU (gloo) against one: the same steps, losses and weights"
import json, os, subprocess, sys
import pytest
from safetensors.torch import load_file

SMALL = ("data.train_samples=48 data.test_samples=8 train.num_train_epochs=1 train.eval_steps=0 train.save_steps=1000 train.validation_samples=0 "
         "train.optim=adamw_torch lora_config.lora_dropout=0 train.learning_rate=1e-3")


def trained(folder, tuning, processes, batch, packing):
    "The log and the weights of a run by so many processes"
    name = f"p{processes}"
    env = os.environ | {"GSM8K_SFT_PATHS_RUNS": str(folder / "runs"), "GSM8K_SFT_PATHS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    done = subprocess.run([sys.executable, *launch, "-m", "gsm8k_sft.train", "--preset", "toy", "--tuning", tuning, "--no-evaluate", "--overrides",
                           f"{SMALL} train.per_device_train_batch_size={batch} train.packing={packing} train.max_tokens=300 run_name={name}"],
                          env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    run = folder / "runs" / "toy" / name
    log = [json.loads(l) for l in (run / "log.jsonl").read_text().splitlines()]
    record = json.loads((run / "record.json").read_text())
    assert record["processes"] == processes
    return log, load_file(next(run.glob("*/*model.safetensors")))


@pytest.mark.parametrize("tuning,packing", [("full", True), ("lora", False)])
def test_two_processes_are_one(tuning, packing, tmp_path):
    (log_one, one), (log_two, two) = trained(tmp_path, tuning, 1, 8, packing), trained(tmp_path, tuning, 2, 4, packing)
    assert [r["step"] for r in log_one] == [r["step"] for r in log_two] == list(range(1, 7))
    assert [r["tokens"] for r in log_one] == [r["tokens"] for r in log_two]
    for key in ("loss", "grad_norm", "learning_rate"): assert [r[key] for r in log_two] == pytest.approx([r[key] for r in log_one], rel=1e-3)
    for n, w in one.items(): assert float((two[n] - w).norm() / w.norm().clamp(min=1e-9)) < 1e-3, n
