"Memory: the ledger against what autograd keeps, the plan against traced peaks, tables, refusals, the harness"
import json, subprocess, sys
from dataclasses import replace
import pytest
from gsm8k_sft.evaluation.archive import unpack
from gsm8k_sft.training import memory
from gsm8k_sft.core.config import choices, load_config, project_path
from gsm8k_sft.training.memory import *
from gsm8k_sft.training.memory import CARDS, CONSTANTS, _alternatives
from gsm8k_sft.models.parameters import parameter_table

PRESETS = ["gemma-2b-it", "gemma-2-9b-it", "gemma-3-270m", "toy", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"]
SHAPE = model_shape(load_config("gemma-2b-it", training=False))

def config(preset="gemma-2b-it", tuning="full", overrides=""): return load_config(preset, tuning, overrides=overrides, training=False)
def total(preset="gemma-2b-it", tuning="full", **kwargs): return plan_memory(preset, tuning, **kwargs).total


# Exactly

@pytest.mark.parametrize("preset", PRESETS)
def test_weights_are_those_of_the_parameter_table(preset):
    table = parameter_table(config(preset), targets=("all-linear",)).set_index("method")
    for tuning in ("full", "lora", "qlora"):
        s = setup(config(preset, tuning))
        assert sum(weight_bytes(model_shape(config(preset)), s)) == pytest.approx(table.loc[tuning, "weights MiB"] * 2**20, rel=1e-6)
        assert sum(trainable_sizes(model_shape(config(preset)), s)) == table.loc[tuning, "trainable"]

@pytest.mark.parametrize("kind", memory.KINDS)
@pytest.mark.parametrize("overrides", ["full", "full model.precision=bf16", "full model.precision=fp32",
                                       "lora", "lora model.precision=bf16"])
def test_the_ledger_is_what_autograd_keeps(kind, overrides):
    case = memory.count_case(kind, overrides, rows=2, longest=80)
    assert case["formula"] == pytest.approx(case["counted"], rel=0.01)

@pytest.mark.parametrize("kind, overrides, kwargs", [
    ("gemma", "full", {}), ("gemma2", "lora", {}), ("gemma", "full", {"accumulate": True}),
    ("gemma3_text", "full model.precision=bf16", {"vocab_size": 300}),
    ("gemma3_text", "lora train.gradient_checkpointing=true", {"vocab_size": 300, "rows": 5}),
    ("gemma", "full train.gradient_checkpointing=true", {"vocab_size": 300}), ("qwen2", "full", {}), ("qwen2", "lora", {}),
    ("qwen2", "full model.precision=bf16 train.gradient_checkpointing=true", {"vocab_size": 300}),
    ("gemma2", "full model.precision=bf16 train.gradient_checkpointing=true", {"vocab_size": 200, "rows": 4})])
def test_the_plan_is_the_traced_peak(kind, overrides, kwargs):
    case = memory.trace_case(kind, overrides, **kwargs)
    assert case["formula"] == pytest.approx(case["traced"], rel=0.03), case

@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_bnb_8bit"])
def test_optimizer_state_is_that_of_a_real_step(optim):
    row, formula, real = memory.step_case("gemma3_text", "full", optim)
    assert formula[:2] == real[:2] and abs(formula[2] - real[2]) < 5000

def test_fused_rows_are_those_of_the_loss(monkeypatch):
    from gsm8k_sft.training import packing
    monkeypatch.setattr(packing, "has_triton", lambda: True)
    assert packing._on.__wrapped__("cuda")[1] == CONSTANTS["fused_rows"]


# In the right order

@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
@pytest.mark.parametrize("preset", ["gemma-2b-it", "gemma-2-9b-it", "gemma-3-270m"])
def test_more_tokens_need_more(preset, tuning):
    for changes in ({}, {"checkpointing": True}, {"loss": "fused", "attention": "flash"}, {"accumulate": True}):
        sizes = [total(preset, tuning, tokens=n, longest=256, **changes) for n in (256, 1024, 4096, 16384)]
        assert sizes == sorted(sizes)

@pytest.mark.parametrize("tokens", [512, 4096, 16384])
def test_what_saves_saves(tokens):
    at = lambda tuning="full", **k: total(tuning=tuning, tokens=tokens, **k)
    assert at("qlora") < at("lora") < at("full")
    assert at(checkpointing=True) <= at(checkpointing=False) and at(precision="bf16") < at()
    assert at("lora", loss="fused", checkpointing=False) < at("lora", loss="plain", checkpointing=False)
    assert at(optim="paged_adamw_8bit") <= at(optim="adamw_bnb_8bit") < at(optim="adamw_torch_fused")
    assert at(accumulate=True) >= at(accumulate=False)

def test_plain_attention_grows_with_the_length():
    short, long = (total("gemma-2-9b-it", "lora", tokens=4096, longest=n, checkpointing=False, attention="plain") for n in (128, 1024))
    assert long > short + 4e9

def test_the_parts_make_the_total():
    p = plan_memory("gemma-2b-it", "lora", tokens=2048)
    parts = p.weights + p.adapters + p.optimizer + p.gradients + p.activations + p.loss + p.copies + p.cache + p.overhead
    assert p.total == parts and p.stage in stage_table("gemma-2b-it", "lora", tokens=2048).index

def test_the_peak_is_the_largest_stage_but_for_the_answers():
    stages = stage_table("gemma-2b-it", "full", tokens=2048)["total"].drop("validation answers")
    assert plan_memory("gemma-2b-it", "full", tokens=2048).total / 2**30 == pytest.approx(stages.max(), abs=0.01)

def test_pages_are_beside_the_total():
    paged, resident = (plan_memory("gemma-2b-it", optim=o) for o in ("paged_adamw_8bit", "adamw_bnb_8bit"))
    assert not resident.paged and paged.paged + paged.optimizer == resident.optimizer

def test_a_setup_of_the_largest_batch():
    s = setup(config(overrides="train.per_device_train_batch_size=8 train.packing=false"), longest=300)
    assert (s.tokens, s.longest, s.padded, s.attention) == (2400, 300, True, "sdpa")
    assert setup(config("gemma-2-9b-it", overrides="train.packing=false")).attention == "eager"
    assert not setup(config("gemma-2-9b-it")).padded
    assert setup(config(overrides="data.max_length=200")).longest == 200
    packed = setup(config(overrides="train.packing=true train.max_tokens=1024 train.per_device_train_batch_size=8"))
    assert (packed.tokens, packed.attention, packed.loss, packed.accumulate) == (1024, "flash", "fused", True)


# Tables and cards

@pytest.mark.parametrize("preset", PRESETS)
def test_every_presets_table_prints(preset):
    assert set(PRESETS) <= set(choices("preset"))
    command = [sys.executable, "-m", "gsm8k_sft.memory", "--preset", preset, "--tokens-per-second", "1000", "--dollars-per-hour", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("qlora") == 2 and "GiB" in done.stdout and "dollars" in done.stdout

def test_cards_grow_and_give_less_than_they_have():
    sizes = [usable(c) for c in CARDS]
    assert sizes == sorted(sizes) and all(usable(c) < CARDS[c] for c in CARDS)
    assert smallest_card(1) == "T4 16" and smallest_card(10**12) == "–"
    with pytest.raises(ValueError, match="card"): usable("H1000")

def test_a_configuration_counts():
    wide = plan_table(config(overrides="lora_config.r=256"), tokens=1024)
    assert wide["adapters"].max() > plan_table("gemma-2b-it", tokens=1024)["adapters"].max()


# What can't be

def test_a_run_that_does_not_fit_is_refused_and_helped():
    said = r"full fine-tuning of google/gemma-2b-it will need .* nothing was loaded\. Nearest: tuning=lora"
    with pytest.raises(MemoryPlanError, match=said): check_fits(config(), CARDS["L4 24"])
    assert check_fits(config(), CARDS["A100 80"]).total < usable("A100 80")

@pytest.mark.parametrize("preset, card", [("gemma-3-270m", 8 * 2**30), ("gemma-2b-it", "L4 24"), ("gemma-2-9b-it", "L4 24"),
                                          ("gemma-2-9b-it", "A100 40"), ("gemma-2b-it", "T4 16"), ("qwen2.5-coder-1.5b", "T4 16")])
def test_the_nearest_really_fits(preset, card):
    free = usable(card) if isinstance(card, str) else card
    words = nearest_fit(config(preset), free).split(" fits")[0].split()
    tuning = next((w.split("=")[1] for w in words if w.startswith("tuning=")), "full")
    overrides = " ".join(w for w in words if not w.startswith("tuning="))
    assert plan_memory(config(preset, tuning, overrides)).total <= free

def test_the_batch_stays_what_it_was():
    cfg = config("gemma-3-270m")
    products = {c["train.per_device_train_batch_size"] * c["train.gradient_accumulation_steps"] for _, c in _alternatives(cfg)}
    assert products == {cfg.train.per_device_train_batch_size}

def test_nothing_fits_on_nothing(): assert "smaller model" in nearest_fit(config(), 10**6)

def test_what_is_not_known_is_not_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "tokenizer.json").write_text("{}")
    cfg = config(overrides=f"model.path={tmp_path}")
    with pytest.raises(UnknownMemory, match="llama"): model_shape(cfg)
    assert check_fits(cfg, 1) is None and memory_record(None) is None

def test_a_head_of_its_own_is_not_known(): # as the larger Qwens have
    with pytest.raises(UnknownMemory, match="head of its own"): model_shape(memory.tiny_config("qwen2", tie_word_embeddings=False))

@pytest.mark.parametrize("changes", [{"loss": "none"}, {"attention": "fast"}])
def test_unknown_choices(changes):
    with pytest.raises(ValueError, match=next(iter(changes))): plan_memory("gemma-2b-it", **changes)

def test_an_epoch_takes_what_it_takes():
    assert epoch_estimate(3_600_000, 1000, 2.5) == {"hours": 1.0, "dollars": 2.5}
    with pytest.raises(MemoryPlanError, match="tokens_per_second"): epoch_estimate(1, 0)


# The harness

TINY = dict(vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16)
CASE = dict(preset="gemma-3-270m", tuning="lora", rows=2, longest=48, overrides="train.optim=adamw_torch_fused", changes=TINY)

def test_comparison_and_figure():
    good, bad = measure(CASE), {**CASE, "error": "ValueError: nonsense"}
    assert good["predicted"] == pytest.approx(good["measured"], rel=0.05) or good["setup"]["device"] == "cuda"
    table = comparison({"items": [good, bad]})
    assert len(table) == 2 and table["error %"].abs().max() < 5 and table["note"].notna().sum() == 1
    assert plot_comparison({"items": [good, bad]}).get_xlabel() == "measured peak (GiB)"

def test_compiled_layers_keep_less_and_recording_copies_gradients():
    for tuning in ("full", "lora"):
        packed = setup(config(tuning=tuning), tokens=8192, loss="fused", attention="flash", dropout=0.0, speedup="none")
        ways = ("none", "compile", "record", "record, layers as they are")
        plain, compiled, recorded, recorded_plain = (plan(SHAPE, replace(packed, speedup=s)).total for s in ways)
        assert compiled < plain < recorded_plain and compiled < recorded < recorded_plain

def test_dropout_in_compiled_layers_is_planned():
    "What tracing on a CPU shows: a byte for each number that an adapter reads, and the dropped inputs of queries, keys and values"
    packed = setup(config(tuning="lora"), tokens=8192, loss="fused", attention="flash", speedup="compile", dropout=0.05)
    more = sum(layer_ledger(SHAPE, packed).values()) - sum(layer_ledger(SHAPE, replace(packed, dropout=0.0)).values())
    assert more == sum(n for n, _ in linear_sizes(SHAPE).values()) + 3 * 2 * SHAPE.hidden

@pytest.mark.parametrize("preset, tokens", [("gemma-3-270m", "1,342,063"), ("qwen2.5-coder-0.5b", "1,500,394")])
def test_an_epoch_has_the_tokens_of_its_tokenizer(preset, tokens, capsys):
    memory.main(preset, tokens_per_second=1000.0)
    assert f"an epoch of {tokens} tokens" in capsys.readouterr().out

def test_what_was_never_fitted_is_foreseen(tmp_path):
    "Peaks of Qwen runs on GPUs, with compiled layers; none was used in making the ledger of Qwen2"
    unpack(project_path("results", "qwen2.5-coder-1.5b"), tmp_path)
    runs = sorted(tmp_path.rglob("record.json"))
    table = comparison({"items": [memory.run_item(path.parent) for path in runs]})
    assert len(table) >= 19 and table["error %"].abs().max() < 5, table

def test_speed_and_time_of_an_epoch(capsys):
    speeds = memory.measured_speeds("gemma-2b-it")
    assert speeds["lora"] > speeds["full"] > 20_000 and memory.measured_speeds("toy") == {}
    memory.main("gemma-2b-it", tokens_per_second=1000.0, tokens_per_epoch=60_000, dollars_per_hour=2.0)
    assert "as given: 1,000 tokens/s, an epoch of 60,000 tokens: 1.0 minutes, 0.03 dollars" in capsys.readouterr().out

def test_sliders_without_a_front_end():
    panel = explore("gemma-3-270m")
    before = panel.children[-1].value
    panel.children[0].value = 16384
    assert "<table" in before and before != panel.children[-1].value
