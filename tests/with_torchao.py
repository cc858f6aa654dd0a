"Stochastic rounding, by `test_variants.py` in a process of its own: where torchao is importable, transformers loads it everywhere"
import os, signal
from itertools import accumulate
import pytest, torch
from safetensors.torch import load_file
from gsm8k_sft.core.config import ConfigError, load_config
from gsm8k_sft.core.runs import run_folder
from gsm8k_sft.models.sources import resolve_model
from gsm8k_sft.reporting.tables import comparison_table, format_table
from gsm8k_sft.train import train
from gsm8k_sft.training.checkpoints import TrainingInterrupted
from gsm8k_sft.training.memory import (_optimizer_bytes, _step_bytes, _trainable_sizes, model_config, model_shape,
                                        random_training_model, setup)
from gsm8k_sft.training.trainer import GSM8KTrainer, training_arguments

SMALL = ("data.train_samples=12 data.test_samples=4 train.per_device_train_batch_size=2 train.gradient_accumulation_steps=2 "
         "train.eval_steps=0 train.validation_samples=0 train.packing=true evaluation.max_new_tokens=8 train.max_steps=6")
TINY = f"{SMALL} train.learning_rate=2e-6 train.warmup_steps=0 train.lr_scheduler_type=constant train.lr_scheduler_kwargs.min_lr=null"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    for name in ("runs", "eval_results"): monkeypatch.setenv(f"GSM8K_SFT_PATHS_{name.upper()}", str(tmp_path / name))


def trained(tuning, overrides, name):
    "The weights of a run"
    cfg = load_config("toy", tuning, overrides=f"{overrides} run_name={name}")
    train(cfg, evaluate=False)
    return load_file(run_folder(cfg) / "model" / "model.safetensors")


def test_small_updates_add_up():
    "At a rate too small for bf16 plain rounding hardly moves the weights, stochastic rounding as far along fp32's direction as fp32"
    base = load_file(resolve_model(load_config("toy").model) / "model.safetensors")
    exact, plain = (trained("full", f"{TINY} model.precision={precision}", precision) for precision in ("fp32", "bf16"))
    found = trained("bf16-stochastic", TINY, "stochastic")
    assert {w.dtype for w in (*plain.values(), *found.values())} == {torch.bfloat16}
    def moved(weights): # the share of fp32's way that lies in their own, over all weights
        ways = [((exact[k] - base[k]).flatten(), (weights[k].float() - base[k].bfloat16().float()).flatten()) for k in base]
        return sum((a @ b).item() for a, b in ways) / sum((a @ a).item() for a, _ in ways)
    assert moved(plain) < 0.1 and moved(found) == pytest.approx(1, abs=0.2)


def test_trains_evaluates_and_stands_in_tables():
    cfg = load_config("toy", "bf16-stochastic", overrides=SMALL)
    record = train(cfg)
    assert (record["status"], record["tuning_method"], record["precision"]) == ("complete", "bf16-stochastic", "bf16")
    assert record["fast_path"] == {"packing": "equal to transformers"}
    assert "full SFT in bf16 with stochastic rounding" in format_table(comparison_table("toy")).to_string()
    assert training_arguments(load_config("toy"), "x").optim_args is None


def test_interrupted_and_resumed_equals_unbroken(monkeypatch):
    whole = trained("bf16-stochastic", SMALL, "whole")
    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted):
        passes, step = [], GSM8KTrainer.training_step
        def counted(*args):
            passes.append(1)
            if len(passes) == 5: os.kill(os.getpid(), signal.SIGTERM)
            return step(*args)
        patch.setattr(GSM8KTrainer, "training_step", counted)
        trained("bf16-stochastic", SMALL, "broken")
    resumed = trained("bf16-stochastic", SMALL, "broken")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_state_is_what_the_plan_says(precision):
    from torchao.optim import AdamW8bit
    cfg = load_config("toy", "bf16-stochastic", overrides=f"model.precision={precision}")
    model = random_training_model(cfg, model_config(cfg))
    optimizer = AdamW8bit(model.parameters())
    for p in model.parameters(): p.grad = torch.ones_like(p)
    with torch.compiler.set_stance("force_eager"): optimizer.step()
    state = [t for s in optimizer.state.values() for k, t in s.items() if k != "step"]
    held = sum(sum(p.nbytes for p in (t.codes, t.scale)) if hasattr(t, "codes") else t.nbytes for t in state)
    planned = setup(cfg)
    assert planned.optim == "adamw_torch_8bit" and _optimizer_bytes(_trainable_sizes(model_shape(cfg), planned), planned) == (held, 0)


def test_what_a_step_makes_for_the_moment():
    "The most bytes that come and go in a compiled step"
    from torch.profiler import profile
    from torchao.optim import AdamW8bit
    weights = [torch.nn.Parameter(torch.randn(shape, dtype=torch.bfloat16)) for shape in ((512, 640), (4096, 640))]
    optimizer = AdamW8bit(weights, bf16_stochastic_round=True)
    for _ in range(2): # the first step makes the state
        for p in weights: p.grad = torch.randn_like(p)
        with profile(profile_memory=True) as seen: optimizer.step()
    changes = [e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    planned = _step_bytes([p.numel() for p in weights], setup(load_config("toy", "bf16-stochastic")))
    assert planned == pytest.approx(max(accumulate(changes)), rel=0.01)


def test_one_process_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="adamw_torch_8bit .*one process.*train.optim=adamw_torch_fused"):
        load_config("toy", "bf16-stochastic")
