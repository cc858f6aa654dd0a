"Forms of a method: trained, evaluated, merged, named in tables and studies, by one word"
import os, subprocess, sys
import pytest, torch
from importlib.util import find_spec
from pathlib import Path
from gsm8k_sft.core.config import ConfigError, load_config, method_of, tuning_of
from gsm8k_sft.core.runs import run_folder
from gsm8k_sft.evaluation.results import read_evaluations
from gsm8k_sft.experiments.study import Job, check_jobs, matrix_jobs, read_study, result_names
from gsm8k_sft.models.adapters import load_tuned
from gsm8k_sft.reporting.tables import comparison_table, format_table
from gsm8k_sft.train import train

FORMS = ["dora", "lora-mlp", *(pytest.param(f, marks=pytest.mark.slow) for f in ("rslora", "lora-attention"))]
SMALL = ("data.train_samples=24", "data.test_samples=4", "train.max_steps=2", "train.packing=true", "train.eval_steps=0",
         "train.validation_samples=0", "evaluation.max_new_tokens=24")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    for name in ("runs", "eval_results"): monkeypatch.setenv(f"GSM8K_SFT_PATHS_{name.upper()}", str(tmp_path / name))


@pytest.mark.parametrize("form", FORMS)
def test_a_form_trains_evaluates_and_merges(form):
    job = Job("toy", f"{form}_main-s0", form, overrides=SMALL)
    cfg = load_config("toy", form, overrides=job.all_overrides)
    assert (cfg.tuning_method, tuning_of(cfg), cfg.train.learning_rate) == ("lora", form, 5e-3), "LoRA's settings, those of the toy too"
    record = train(cfg)
    assert (record["status"], record["tuning_method"]) == ("complete", form) and record["fast_path"] == {"packing": "equal to transformers"}
    assert record["evaluations"] == result_names(job), "a study finds what was evaluated"
    names = {n.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] for n, _ in load_tuned(run_folder(cfg))[0].named_parameters() if ".lora_A." in n}
    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    assert names == {"lora-mlp": mlp, "lora-attention": attention}.get(form, attention | mlp)
    ids = torch.arange(5, 45).view(2, 20)
    (adapter, _), (merged, _) = (load_tuned(run_folder(cfg), merge=m) for m in (False, True))
    with torch.no_grad(): torch.testing.assert_close(merged(ids).logits, adapter(ids).logits, atol=1e-3, rtol=1e-3)
    table = comparison_table("toy")
    assert table.model.tolist() == [form] and table.trainable.iloc[0] == record["parameters"]["trainable"]
    label = {"dora": "DoRA", "rslora": "rsLoRA", "lora-mlp": "LoRA, MLP only", "lora-attention": "LoRA, attention only"}[form]
    assert label in format_table(table).to_string() and read_evaluations()[0]["model_type"] == form


def test_a_form_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "configs" / "variant").mkdir(parents=True)
    (tmp_path / "configs" / "variant" / "tiny.yaml").write_text("tuning_method: lora\nlora_config: {r: 2}\n")
    (tmp_path / "configs" / "variant" / "half.yaml").write_text("lora_config: {r: 2}\n")
    monkeypatch.chdir(tmp_path)
    cfg = load_config("toy", "tiny", training=False)
    assert (cfg.run_name, cfg.lora_config.r, cfg.tuning_method) == ("tiny_main-s0", 2, "lora")
    with pytest.raises(ConfigError, match="tuning: 'half' is not one of full, lora, qlora, .*tiny"): method_of("half")
    monkeypatch.setenv("GSM8K_SFT_SWEEP_TUNING", "full tiny")
    assert [j.name for j in matrix_jobs()][::3] == ["full_main-s0", "tiny_main-s0"]
    monkeypatch.setenv("GSM8K_SFT_SWEEP_TUNING", "tinny")
    with pytest.raises(ConfigError, match="tuning: 'tinny' is not one of .* Did you mean 'tiny'"): matrix_jobs()
    (tmp_path / "study.yaml").write_text("preset: toy\nmethods: {a: {tuning: doora, learning_rates: [1.0e-3]}}\n")
    with pytest.raises(ConfigError, match="study.yaml: methods.a: tuning: 'doora'.* Did you mean 'dora'"):
        check_jobs(read_study("study.yaml"))


def test_stochastic_rounding(monkeypatch):
    "In a process that finds torchao, which `make install` puts where others don't; without it the message says what is missing"
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"needs torchao: pip install 'gsm8k_sft\[torchao\]'"):
        patch.setattr("gsm8k_sft.core.config.find_spec", lambda name: None)
        load_config("toy", "bf16-stochastic")
    cfg = load_config("gemma-3-270m", "bf16-stochastic", training=False)
    assert (method_of("bf16-stochastic"), cfg.model.precision, cfg.train.learning_rate) == ("full", "bf16", 2e-4), "full's settings"
    if not (apart := Path(sys.prefix) / "torchao").exists() and not find_spec("torchao"): pytest.skip("no torchao in .venv/torchao")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name("with_torchao.py"))]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    paths = os.pathsep.join([str(apart), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(words, env=environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "skipped" not in done.stdout, (done.stdout + done.stderr)[-4000:]
