"The package as users have it: built as a wheel, installed beside nothing else, run in an empty folder"
import json, os, shutil, subprocess, sys, zipfile
from pathlib import Path

import pytest

from gsm8k_sft.core.config import project_root

ROOT = project_root(Path(__file__).parent)
TINY = ("data.train_samples=24 data.test_samples=4 data.validation_fraction=0.01 train.eval_steps=0 train.validation_samples=0 "
        "evaluation.max_new_tokens=32")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "A folder with nothing but the installed wheel, which was built from what git tracks"
    source, made, target = (tmp_path_factory.mktemp(name) for name in ("source", "made", "target"))
    names = subprocess.run(["git", "ls-files", "gsm8k_sft", "nbs/02_train.ipynb", "pyproject.toml", "README.md", "LICENSE", "NOTICE"],
                           cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name, follow_symlinks=False)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", made, source], check=True)
    wheel = next(made.glob("*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    return wheel, target


@pytest.fixture
def run(installed, tmp_path):
    "Run a command of the installed package in an empty folder"
    def call(*command, status=0):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("GSM8K", "WANDB"))} | {"PYTHONPATH": str(installed[1])}
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, done.stdout + done.stderr
        return done
    return call


def test_the_wheel_holds_what_it_needs(installed):
    files = set(zipfile.ZipFile(installed[0]).namelist())
    for name in ("configs/base.yaml", "configs/preset/toy.yaml", "configs/dataset/main.yaml", "configs/study/gemma-3-270m.yaml",
                 "assets/toy/model.safetensors", "notebooks/02_train.ipynb", "core/config.py", "training/trainer.py"):
        assert f"gsm8k_sft/{name}" in files
    assert not [f for f in files if f.startswith(("nbs/", "tests/", "results/"))]


def test_train_and_evaluate_a_preset_of_ones_own_in_an_empty_folder(run, installed, tmp_path):
    own = tmp_path / "configs" / "preset" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text((installed[1] / "gsm8k_sft" / "configs" / "preset" / "toy.yaml").read_text() + "lora_config: {r: 3}\n")
    done = run(sys.executable, "-m", "gsm8k_sft.train", "--preset", "mine", "--tuning", "lora", "--overrides", TINY + " run_name=first")
    folder = tmp_path / "runs" / "mine" / "first"
    record = json.loads((folder / "record.json").read_text())
    assert (record["status"], record["preset"], record["tuning_method"]) == ("complete", "mine", "lora"), done.stdout
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 3
    assert os.path.join("runs", "mine", "first") in done.stdout, "the run says where it writes"
    result = json.loads((tmp_path / "eval_results" / f"{record['evaluations'][0]}.json").read_text())
    assert result["n"] == 4 and len(list((tmp_path / "eval_results").glob("*.predictions.jsonl"))) == 1
    assert not {p.name for p in tmp_path.iterdir()} - {"configs", "runs", "eval_results", ".cache"}


def test_the_console_command(run, installed, tmp_path):
    command = [sys.executable, installed[1] / "bin" / "gsm8k-sft"]
    assert "evaluate" in run(*command, "--help").stdout
    assert "--overrides" in run(*command, "train", "--help").stdout
    assert run(*command, "trian", status=2).stderr.startswith("gsm8k-sft: there is no command 'trian'. Did you mean 'train'?")
    run(*command, "notebook")
    assert (tmp_path / "02_train.ipynb").read_bytes() == (ROOT / "nbs" / "02_train.ipynb").read_bytes()
    assert "is left as it is" in run(*command, "notebook", status=1).stderr
