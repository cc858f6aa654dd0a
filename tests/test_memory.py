"Memory: the ledger against what autograd keeps, the plan against traced peaks, tables, refusals, the harness"
import re, weakref
from contextlib import contextmanager
from dataclasses import replace
import bitsandbytes as bnb
import pytest, torch
from transformers import AutoConfig
from parameters import parameter_table
from gsm8k_sft.benchmarks.memory import main
from gsm8k_sft.benchmarks.training import measure_training
from gsm8k_sft.core.config import choices, load_config, project_path
from gsm8k_sft.core.runs import CUDA_CONTEXT, _may_take, free_memory, read_config, read_json
from gsm8k_sft.evaluation.archive import unpack
from gsm8k_sft.train import load_for_training, train
from gsm8k_sft.training.graphs import training_mode
from gsm8k_sft.training.loss import COMPILED_ROWS, packed_loss
from gsm8k_sft.training import memory
from gsm8k_sft.training.checks import checked_config
from gsm8k_sft.training.memory import (
    CARDS, CONSTANTS, KINDS, LiveBytes, MemoryPlanError, TOKENS, UnknownMemory, _layer_ledger, _linear_sizes, _optimizer_bytes,
    _trainable_sizes, _weight_bytes, check_fits, example_tokens, fit_tokens, memory_record, model_shape, nearest_fit,
    plan, plan_memory, plan_table, preset_for_card, random_training_model, setup, smallest_card, stage_table, trace_plan, usable)
from gsm8k_sft.training.packing import PackedCollator

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
        assert sum(_weight_bytes(model_shape(config(preset)), s)) == pytest.approx(table.loc[tuning, "weights MiB"] * 2**20, rel=1e-6)
        assert sum(_trainable_sizes(model_shape(config(preset)), s)) == table.loc[tuning, "trainable"]

SMALL = dict(vocab_size=1500, hidden_size=96, intermediate_size=320, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
             head_dim=32, pad_token_id=0, tie_word_embeddings=True)
WIDE = dict(hidden_size=64, intermediate_size=512, num_attention_heads=8, num_key_value_heads=1, head_dim=16, num_hidden_layers=4,
            vocab_size=3000)

def small_config(kind, **changes): return AutoConfig.for_model(kind, **(SMALL | changes))

def small_case(kind, overrides, rows, longest, padded=True, **changes):
    "Configuration, transformers' configuration, shape and `Setup` of a small padded case on the CPU"
    tuning, *more = overrides.split()
    plain = ["train.gradient_accumulation_steps=1", "train.optim=adamw_torch_fused", "train.eval_steps=0", "train.packing=false",
             f"train.per_device_train_batch_size={rows}"]
    cfg, transformers = config("gemma-3-270m", tuning, [*plain, *more]), small_config(kind, **changes)
    shape = model_shape(transformers)
    attention = cfg.model.attn_implementation or ("eager" if kind == "gemma2" else "sdpa")
    return cfg, transformers, shape, setup(cfg, tokens=rows * longest, longest=longest, padded=padded, attention=attention, device="cpu")

def random_batch(rows, longest, vocabulary, padded=True):
    "Random ids; with `padded`, the last row is a third shorter"
    ids = torch.randint(1, vocabulary, (rows, longest))
    mask = torch.ones_like(ids)
    if padded: mask[-1, -longest // 3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

@contextmanager
def saved(model):
    "Storage -> bytes of what autograd keeps for the backward pass; the model's own tensors don't count"
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}
    def pack(tensor):
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in own and key not in kept:
            kept[key] = storage.nbytes()
            weakref.finalize(storage, kept.pop, key, None) # DoRA's norm needs no gradient: its graph is gone at once
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): yield kept

COUNTED = {"gemma": ["full model.precision=bf16", "full", "full model.precision=fp32", "lora", "lora model.precision=bf16",
                     "lora model.precision=fp32 lora_config.lora_dropout=0", "full model.attn_implementation=eager"],
           "gemma2": ["full", "full model.precision=bf16", "full model.precision=fp32", "lora", "lora model.precision=bf16"],
           "gemma3_text": ["full", "full model.precision=bf16", "full model.precision=fp32", "lora", "lora model.precision=bf16",
                           "lora lora_config.lora_dropout=0", "lora model.precision=bf16 lora_config.target_modules=[q_proj,v_proj]"],
           "qwen2": ["full", "full model.precision=bf16", "full model.precision=fp32", "lora", "lora model.precision=bf16"]}

@pytest.mark.parametrize("kind, overrides, changes", [
    *((k, o, {}) for k, settings in COUNTED.items() for o in settings),
    *((k, f"lora lora_config.use_dora=true{o}", {}) for k, o in zip(KINDS, ("", " model.precision=bf16", " lora_config.lora_dropout=0",
                                                                           " model.precision=fp16 lora_config.target_modules=[v_proj]"))),
    ("gemma", "full", {"padded": False}), ("gemma3_text", "lora", {"padded": False}), ("qwen2", "full", {"padded": False}),
    *((k, o, WIDE) for k in KINDS for o in ("full", "lora model.precision=bf16")),
    *((k, f"{t} model.precision=fp16", {}) for k, t in (("gemma3_text", "full"), ("gemma3_text", "lora"), ("qwen2", "lora")))])
def test_the_ledger_is_what_autograd_keeps(kind, overrides, changes):
    padded, changes = changes.get("padded", True), {k: v for k, v in changes.items() if k != "padded"}
    cfg, transformers, shape, s = small_case(kind, overrides, 3, 64, padded, **changes)
    model = random_training_model(cfg, transformers)
    half = {"mixed": torch.bfloat16, "fp16": torch.float16}.get(s.precision)
    with saved(model) as kept, torch.autocast("cpu", half, enabled=half is not None):
        loss = model(**random_batch(3, 64, shape.vocabulary, padded), use_cache=False).loss
    p = plan(shape, s, "loss") # besides what is kept this stage has the logits and, if they are bf16, an fp32 copy
    formula = p.activations + p.copies + p.loss - s.tokens * shape.vocabulary * (4 if s.precision == "fp32" else 6)
    assert loss.requires_grad and formula == pytest.approx(sum(kept.values()), rel=0.02)

CHECKPOINT, FEW, MANY = " train.gradient_checkpointing=true", {"vocab_size": 300}, {"vocab_size": 6000}
LONG = {"rows": 6, "longest": 100, **FEW}
TRACED = [("gemma", "full", {}), ("gemma2", "lora", {}), ("qwen2", "full", {}), ("qwen2", "lora", {}),
          ("qwen2", "full model.precision=bf16" + CHECKPOINT, FEW), ("gemma2", "full model.precision=bf16" + CHECKPOINT, LONG),
          ("gemma3_text", "full model.precision=bf16" + CHECKPOINT, {"rows": 1, "longest": 32, **MANY})]
TRACED += [("gemma2", "full" + CHECKPOINT, MANY), ("gemma3_text", "lora" + CHECKPOINT, MANY)]
TRACED += [pytest.param(k, t + c, MANY, marks=pytest.mark.slow) for k in KINDS for t in ("full", "lora") # quick: these, and the chapter
           for c in ("", CHECKPOINT) if (k, t + c, MANY) not in TRACED]
TRACED += [("gemma3_text", "lora lora_config.use_dora=true", MANY), ("qwen2", "lora model.precision=bf16 lora_config.use_dora=true", LONG)]
TRACED += [("gemma", "full model.precision=bf16" + c, v) for c in ("", CHECKPOINT) for v in (FEW, MANY)]
TRACED += [pytest.param("gemma3_text", t + c, LONG, marks=[pytest.mark.slow] * (t.startswith("lora") == bool(c)))
           for t in ("full", "lora", "lora model.precision=bf16") for c in ("", CHECKPOINT)]
ACCUMULATED = "full train.gradient_accumulation_steps=2"
TRACED += [("gemma", ACCUMULATED, MANY), ("gemma", ACCUMULATED + CHECKPOINT, FEW)]
TRACED += [pytest.param("gemma", *grid, marks=pytest.mark.slow) for grid in ((ACCUMULATED, FEW), (ACCUMULATED + CHECKPOINT, MANY))]

@pytest.mark.parametrize("kind, overrides, changes", TRACED)
def test_the_plan_is_the_traced_peak(kind, overrides, changes):
    rows, longest = changes.get("rows", 3), changes.get("longest", 64)
    changes = {k: v for k, v in changes.items() if k == "vocab_size"}
    cfg, transformers, shape, s = small_case(kind, overrides, rows, longest, rows > 1, **changes)
    found = plan(shape, s)
    assert found.total == pytest.approx(trace_plan(cfg, longest, transformers).total - CONSTANTS["workspace"], rel=0.02), found

@pytest.mark.parametrize("kind, overrides", [("gemma3_text", "full model.precision=fp16"), ("qwen2", "lora model.precision=fp16"),
    ("gemma2", "full model.precision=fp32"), ("qwen2", "full model.precision=fp16" + CHECKPOINT),
    ("gemma3_text", "lora model.precision=fp16" + CHECKPOINT)])
@pytest.mark.parametrize("lengths", [[64] * 6, [200, 100, 50, 30]])
def test_packed_rows_with_plain_attention_are_padded_to_the_longest(kind, overrides, lengths):
    "As on a GPU without bf16: scores are as wide as the longest example of a chunk, for all of its examples"
    (tuning, *more), transformers = overrides.split(), small_config(kind, **FEW)
    cfg = config("gemma-3-270m", tuning, ["train.packing=true", "train.gradient_accumulation_steps=1", *more])
    shape = model_shape(transformers)
    s = setup(cfg, tokens=sum(lengths), longest=max(lengths), rows=len(lengths), attention="plain", device="cpu", speedup="none")
    model = random_training_model(cfg, transformers)
    inner, half = model.get_base_model() if tuning == "lora" else model, torch.float16 if s.precision == "fp16" else None
    examples = [dict.fromkeys(("input_ids", "labels"), torch.randint(1, shape.vocabulary, (n,))) for n in lengths]
    chunk = PackedCollator(10**9)(examples)["chunks"][0]
    with LiveBytes(model) as live, training_mode(inner):
        with torch.autocast("cpu", half, enabled=half is not None): loss = packed_loss(model, inner, chunk, half, compiled_softmax=False)
        loss.backward()
    found = plan(shape, replace(s, optim="adamw_bnb_8bit"))
    assert found.total - found.optimizer == pytest.approx(live.peak, rel=0.06), found

def test_a_chunk_of_many_examples_is_planned():
    "Of 8,192 tokens, 43 examples of GSM8K's average length; with flash attention it doesn't matter"
    many = "train.per_device_train_batch_size=64 model.precision="
    half, bf16 = (setup(config("gemma-3-270m", overrides=many + p)) for p in ("fp16", "mixed"))
    assert half.rows == bf16.rows == 44 and setup(config("gemma-3-270m")).rows == 32
    assert plan(SHAPE, half).activations > 1.2 * plan(SHAPE, replace(half, rows=0)).activations
    assert plan(SHAPE, bf16) == plan(SHAPE, replace(bf16, rows=0))

def state_bytes(optimizer):
    tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())

@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_bnb_8bit"])
@pytest.mark.parametrize("kind, overrides", [("gemma", "full"), ("gemma3_text", "full model.precision=bf16"), ("gemma2", "lora"),
                                             ("gemma3_text", "lora model.precision=bf16"), ("qwen2", "full"), ("gemma3_text", "full"),
                                             ("qwen2", "lora lora_config.use_dora=true")])
def test_weights_gradients_and_optimizer_state_are_those_of_a_real_step(kind, overrides, optim):
    cfg, transformers, shape, s = small_case(kind, overrides, 2, 32)
    model, s = random_training_model(cfg, transformers), replace(s, optim=optim)
    optimizer = (bnb.optim.AdamW8bit if "8bit" in optim else torch.optim.AdamW)([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    if "8bit" in optim: # as transformers' Trainer does
        bnb.optim.GlobalOptimManager.get_instance().register_module_override(model.get_input_embeddings(), "weight", {"optim_bits": 32})
    with torch.autocast("cpu", torch.bfloat16, enabled=s.precision == "mixed"): loss = model(**random_batch(2, 32, shape.vocabulary)).loss
    loss.backward()
    optimizer.step()
    gradients, width = [p.grad.nbytes for p in model.parameters() if p.grad is not None], 2 if s.precision == "bf16" else 4
    assert sum(_weight_bytes(shape, s)) == sum(p.numel() * p.element_size() for p in model.parameters())
    assert sum(_trainable_sizes(shape, s)) * width == sum(gradients)
    assert abs(_optimizer_bytes(_trainable_sizes(shape, s), s)[0] - state_bytes(optimizer)) < 5000 # counters and tables

def test_fused_rows_are_those_of_the_loss(): assert COMPILED_ROWS == CONSTANTS["fused_rows"]


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
def test_every_presets_table_prints(preset, capsys):
    assert set(PRESETS) <= set(choices("preset"))
    main(preset, tokens_per_second=1000, dollars_per_hour=2)
    shown = capsys.readouterr().out
    assert shown.count("qlora") == 2 and "GiB" in shown and "dollars" in shown

def test_cards_grow_and_give_less_than_they_have():
    sizes = [usable(c) for c in CARDS]
    assert sizes == sorted(sizes) and all(usable(c) < CARDS[c] for c in CARDS)
    assert smallest_card(1) == "T4 16" and smallest_card(10**12) == "–"
    with pytest.raises(ValueError, match="card"): usable("H1000")

def test_a_configuration_counts():
    wide = plan_table(config(overrides="lora_config.r=256"), tokens=1024)
    assert wide["adapters"].max() > plan_table("gemma-2b-it", tokens=1024)["adapters"].max()


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_pass_is_as_large_as_the_card_allows(tuning):
    def chosen(card, batch="24 train.gradient_accumulation_steps=3"):
        asked = "train.max_tokens=null model.precision=bf16 train.optim=paged_adamw_8bit"
        cfg = config("gemma-2b-it", tuning, f"{asked} train.per_device_train_batch_size={batch}")
        fit_tokens(cfg, free=usable(card))
        return cfg
    sizes = []
    for card in ("L4 24", "A100 40", "H100 80"):
        cfg = chosen(card)
        assert (cfg.train.per_device_train_batch_size, cfg.train.gradient_accumulation_steps) == (72, 1), "the gradient's examples"
        assert plan_memory(cfg).total <= usable(card)
        sizes.append(cfg.train.max_tokens)
        if card != "H100 80": # there, a whole step fits
            cfg.train.max_tokens += 1024
            assert plan_memory(cfg).total > usable(card)
    assert sizes == sorted(set(sizes))
    assert chosen("H100 80", "16").train.max_tokens < chosen("H100 80").train.max_tokens, "no more than a step has"

def test_workers_share_a_card():
    "Alone, all that is free; else a part, less what is held, and all parts with their contexts are no more than the card"
    card = CARDS["H100 80"]
    assert _may_take(card // 2, card, 10**9, 1) == card // 2
    for workers in (2, 3, 7):
        part = _may_take(card, card, 0, workers)
        assert card - workers < workers * (part + CUDA_CONTEXT) <= card
        assert _may_take(card, card, 10**9, workers) == part - 10**9 and _may_take(2**20, card, 10**9, workers) == 2**20

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_a_worker_takes_no_more_than_its_part(monkeypatch):
    def take(n): return torch.empty(n, dtype=torch.uint8, device="cuda")
    monkeypatch.setenv("GSM8K_SFT_WORKERS", "4")
    try:
        before, held = free_memory(), take(2**30)
        assert free_memory() <= before - 2**30 and before < torch.cuda.mem_get_info()[1] // 4
        with pytest.raises(torch.OutOfMemoryError): take(before)
        del held
        take(before - 2**28)
    finally: torch.cuda.set_per_process_memory_fraction(1.0)

def test_a_pass_is_chosen_only_where_it_is_asked_for(monkeypatch):
    for overrides in ("train.max_tokens=2048", "train.max_tokens=null train.packing=false"):
        cfg = config(overrides=overrides)
        fit_tokens(before := cfg.copy(), free=usable("L4 24"))
        assert before == cfg
    unknown = config("gemma-3-270m", "lora", "train.max_tokens=null train.gradient_accumulation_steps=2 lora_config.rank_pattern.q_proj=64")
    fit_tokens(unknown, free=usable("L4 24"))
    assert unknown.train.max_tokens == TOKENS and unknown.train.gradient_accumulation_steps == 2, "batches stay as asked"
    monkeypatch.setattr(memory, "plan_memory", lambda *args, **kwargs: asked.append(1) or plan_memory(*args, **kwargs))
    asked, huge = [], config("gemma-3-270m", overrides="train.max_tokens=null train.per_device_train_batch_size=4000")
    fit_tokens(huge, free=usable("T4 16"))
    assert 1 < len(asked) <= 66 and plan_memory(huge).total <= usable("T4 16"), "of a step of 800 times 1,024 tokens"

@pytest.mark.parametrize("preset, tuning, whole", [("gemma-2-9b-it", "full", True), ("gemma-2b-it", "lora", False)])
def test_where_nothing_fits_the_pass_that_needs_least_is_chosen(preset, tuning, whole):
    "A whole step may: its gradients don't wait for another pass's"
    asked = "train.max_tokens=null train.optim=adamw_torch_fused train.gradient_accumulation_steps=1 train.per_device_train_batch_size=72"
    cfg = config(preset, tuning, f"{asked} train.gradient_checkpointing={str(whole).lower()}")
    fit_tokens(cfg, free=2**30)
    def needs(tokens): return plan_memory(cfg.copy() | {"train": cfg.train | {"max_tokens": tokens}}).total
    assert (cfg.train.max_tokens > 1024) == whole and needs(cfg.train.max_tokens) <= min(needs(1024), needs(18432))
    with pytest.raises(MemoryPlanError, match="will need .* nothing was trained"): check_fits(cfg, 2**31)


# What can't be

def test_a_run_that_does_not_fit_is_refused_and_helped():
    said = r"full fine-tuning of google/gemma-2b-it will need .* nothing was trained\. Nearest: tuning=lora"
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
    for free in (2 * 2**30, 4 * 2**30, 6 * 2**30, 8 * 2**30):
        words = dict(w.split("=") for w in nearest_fit(cfg, free).split(" fits")[0].split() if "=" in w)
        rows = int(words.get("train.per_device_train_batch_size", cfg.train.per_device_train_batch_size))
        steps = int(words.get("train.gradient_accumulation_steps", cfg.train.gradient_accumulation_steps))
        assert rows * steps == cfg.train.per_device_train_batch_size * cfg.train.gradient_accumulation_steps

def test_processes_are_counted():
    "FSDP2 shares out 9B; DDP shares out nothing, and sums the gradients where they are"
    cfg = config("gemma-2-9b-it", overrides="train.optim=adamw_torch_fused")
    one, ddp, fsdp, four = (plan_memory(cfg, processes=n, sharded=s) for n, s in ((1, False), (2, False), (2, True), (4, True)))
    assert (fsdp.weights, fsdp.optimizer) == (one.weights // 2, one.optimizer // 2) and four.total < fsdp.total < one.total < ddp.total
    assert 0 < ddp.total - one.total < one.weights, "none is gone while others are made, none is there twice"
    h100 = CARDS["H100 80"]
    assert check_fits(cfg, h100, 544, processes=2, sharded=True).total < usable("H100 80")
    with pytest.raises(MemoryPlanError, match="To try it all the same: train.check_memory=false"):
        check_fits(cfg, h100 * 9 // 10, 544, processes=2)

def test_advice_need_not_be_taken(capsys):
    cfg = config(overrides="train.check_memory=false")
    assert check_fits(cfg, CARDS["L4 24"]).total > usable("L4 24")
    assert "it is tried all the same" in capsys.readouterr().out

@pytest.mark.parametrize("card, tuning, bf16, preset", [
    (None, "full", None, "toy"), ("T4 16", "full", False, "gemma-3-270m"), ("T4 16", "lora", False, "gemma-3-270m"),
    ("L4 24", "lora", True, "qwen2.5-coder-0.5b"), ("H100 80", "full", True, "qwen2.5-coder-1.5b")])
def test_a_card_gets_the_largest_preset_that_fits(card, tuning, bf16, preset):
    free = card and usable(card)
    found, overrides = preset_for_card(tuning, free, bf16)
    assert found == preset
    if free: assert check_fits(load_config(found, tuning, overrides=overrides, training=False, bf16=bf16), free, 544).total <= free

def test_the_command_plans_several_gpus(capsys):
    main("gemma-2-9b-it", gpus=2)
    out = capsys.readouterr().out
    assert "DDP, on each of 2 GPUs" in out and "FSDP2, on each of 2 GPUs" in out
    for name, value in (("gpus", -1), ("tokens", -5), ("dollars_per_hour", float("nan")), ("tokens_per_second", float("inf"))):
        with pytest.raises(SystemExit, match=f"{name}: {value} must be"): main("gemma-2-9b-it", **{name: value})

def test_nothing_fits_on_nothing(): assert "smaller model" in nearest_fit(config(), 10**6)

def test_padded_steps_in_place_of_packed_ones_are_planned_anew(tmp_path, monkeypatch):
    for key in ("RUNS", "EVAL_RESULTS"): monkeypatch.setenv(f"GSM8K_SFT_PATHS_{key}", str(tmp_path / key))
    monkeypatch.setattr("gsm8k_sft.training.checks.packing_fault", lambda *args: "a fault")
    cfg = load_config("toy", overrides="train.packing=true train.max_steps=1 train.warmup_steps=0 train.eval_steps=0 data.train_samples=32 "
                                       "train.learning_rate=1e-3 train.per_device_train_batch_size=8")
    longest, record = load_for_training(cfg).longest, train(cfg, evaluate=False)
    padded = config("toy", overrides="train.packing=false train.eval_steps=0 train.per_device_train_batch_size=8")
    assert record["fast_path"] == {"packing": "a fault"}
    assert record["memory"]["predicted"] == plan_memory(padded, longest=longest).total != plan_memory(cfg, longest=longest).total

def test_padded_batches_hold_no_more_than_before_where_a_card_has_room_for_a_whole_packed_step(monkeypatch):
    monkeypatch.setattr("gsm8k_sft.training.checks.packing_fault", lambda *args: "a fault")
    cfg, rows = config("gemma-2b-it", "lora", "train.per_device_train_batch_size=64"), [{"input_ids": [1] * 500}]
    fit_tokens(cfg, longest=500, free=80 * 2**30)
    assert cfg.train.max_tokens > 12_000
    padded, _ = checked_config(cfg, torch.nn.Linear(1, 1), rows, 0, None)
    assert (padded.train.per_device_train_batch_size, padded.train.gradient_accumulation_steps) == (16, 4)

def test_what_is_not_known_is_not_refused(tmp_path):
    cfg = config("gemma-3-270m", "full", llama(tmp_path))
    with pytest.raises(UnknownMemory, match="llama"): model_shape(cfg)
    assert check_fits(cfg, 1) is None and memory_record(None) is None # no longest example, no plan

def test_a_head_of_its_own_is_not_known(): # as the larger Qwens have
    with pytest.raises(UnknownMemory, match="head of its own"): model_shape(small_config("qwen2", tie_word_embeddings=False))

@pytest.mark.parametrize("changes", [{"loss": "none"}, {"attention": "fast"}])
def test_unknown_choices(changes):
    with pytest.raises(ValueError, match=next(iter(changes))): plan_memory("gemma-2b-it", **changes)

def test_a_speed_below_zero_is_refused():
    with pytest.raises(SystemExit, match="tokens_per_second"): main("gemma-2b-it", tokens_per_second=-1.0)


def test_the_optimizers_step_may_be_a_traced_peak():
    "After a pass of few tokens: gradients, and torch's plain AdamW makes as much again"
    small = AutoConfig.for_model("llama", **{k: v for k, v in SMALL.items() if k != "head_dim"})
    own = "train.packing=false train.per_device_train_batch_size=1 train.gradient_accumulation_steps=1 model.precision=fp32"
    found = {o: trace_plan(config(overrides=f"{own} train.optim={o}"), 4, small) for o in ("adamw_torch", "adamw_torch_fused")}
    assert found["adamw_torch"].activations == 2 * found["adamw_torch"].weights > found["adamw_torch_fused"].activations


# Other architectures

def llama(folder):
    "A folder with a tiny Llama's configuration; its weights are never read"
    shape = {k: v for k, v in SMALL.items() if k != "tie_word_embeddings"}
    AutoConfig.for_model("llama", **shape).save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_text("{}")
    return f"model.path={folder} train.packing=false train.optim=adamw_torch_fused"

@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_an_unknown_architecture_is_traced(tmp_path, tuning):
    cfg = config("gemma-3-270m", tuning, llama(tmp_path))
    needed = check_fits(cfg, 10**12, longest=64)
    assert needed.stage == "traced" and needed.total > needed.weights + needed.adapters + needed.optimizer
    with pytest.raises(MemoryPlanError, match="nothing was trained"): check_fits(cfg, 10**6, longest=64)

def test_an_unknown_architecture_never_gets_gemmas_tokens(tmp_path, capsys):
    overrides = llama(tmp_path)
    with pytest.raises(UnknownMemory, match="give longest"): example_tokens(replace(SHAPE, kind="llama"))
    with pytest.raises(SystemExit, match="--longest"): main("gemma-3-270m", overrides=overrides)
    main("gemma-3-270m", overrides=overrides, longest=64, tokens_per_second=1000.0)
    said = capsys.readouterr().out
    assert "traced on fake tensors" in said and "epoch" not in said

def test_packed_rows_of_an_unknown_architecture_have_no_plan(tmp_path):
    cfg = config("gemma-3-270m", "full", llama(tmp_path).replace("packing=false", "packing=true"))
    assert check_fits(cfg, 10**6, longest=64) is None


# Adapters that the ledger doesn't know

BEYOND = ["modules_to_save=[lm_head]", "rank_pattern.q_proj=64", "alpha_pattern.q_proj=8", "bias=all",
          "target_modules=[q_proj,embed_tokens]"]

@pytest.mark.parametrize("extra", BEYOND)
def test_an_adapter_that_is_not_known_has_no_number(extra):
    cfg = config("gemma-3-270m", "lora", f"lora_config.{extra}")
    with pytest.raises(UnknownMemory, match=extra.split("=")[0].split(".")[0]): plan_memory(cfg)
    assert check_fits(cfg, 10**6) is None # nothing is refused
    assert plan_table(cfg).set_index("method").loc["lora", "total"].isna().all()
    assert plan_memory(config("gemma-3-270m", "full", f"lora_config.{extra}")).total # full fine-tuning has no adapter

def test_it_is_no_advice_either():
    assert "tuning=" not in nearest_fit(config(overrides="lora_config.rank_pattern.q_proj=64"), usable("L4 24"))

@pytest.mark.parametrize("tuning, more", [("lora", "train.gradient_checkpointing=true"), ("qlora", "train.gradient_checkpointing=false")])
def test_of_dora_only_what_was_traced_has_a_plan(tuning, more):
    asked = [f"lora_config.use_dora={d} {more}" for d in ("false", "true")]
    assert plan_memory(config("gemma-2b-it", tuning, asked[0])).total
    with pytest.raises(UnknownMemory, match="use_dora.*DoRA without checkpointing and 4-bit weights"):
        plan_memory(config("gemma-2b-it", tuning, asked[1]))
    assert plan_memory(config("gemma-2b-it", "dora")).total > 1.5 * total("gemma-2b-it", "lora")

@pytest.mark.parametrize("plain", ["use_rslora=true", "init_lora_weights=gaussian", "use_dora=false", "bias=none"])
def test_what_changes_no_bytes_has_a_plan(plain):
    assert plan_memory(config("gemma-3-270m", "lora", f"lora_config.{plain}")) == plan_memory("gemma-3-270m", "lora")

@pytest.mark.parametrize("extra", ["use_dora=true", "modules_to_save=[lm_head]", "rank_pattern.q_proj=64"])
def test_padded_it_is_traced_and_needs_more(extra):
    padded = "train.packing=false train.optim=adamw_torch_fused train.per_device_train_batch_size=2 "
    plain, more = (trace_plan(config("gemma-3-270m", "lora", padded + o), 64, small_config("qwen2")) for o in ("", f"lora_config.{extra}"))
    assert more.total > plain.total and more.adapters > plain.adapters


# The harness

TINY = dict(vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16)
CASE = dict(preset="gemma-3-270m", name="small", trainer="ours", without="", tuning="lora", steps=3, warm=1,
            overrides="train.optim=adamw_torch_fused train.packing=false train.per_device_train_batch_size=2 "
                      "train.gradient_accumulation_steps=1 lora_config.lora_dropout=0.05")

def test_a_measured_case_is_predicted():
    rows = [{"input_ids": list(range(3, 51 - k % 2 * 5)), "labels": list(range(3, 51 - k % 2 * 5))} for k in range(12)]
    found = measure_training(CASE, rows, changes=TINY)
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.05)

def test_compiled_layers_keep_less_and_recording_copies_gradients():
    for tuning in ("full", "lora"):
        packed = setup(config(tuning=tuning), tokens=8192, loss="fused", attention="flash", dropout=0.0, speedup="none")
        ways = ("none", "compile", "record", "record, layers as they are")
        plain, compiled, recorded, recorded_plain = (plan(SHAPE, replace(packed, speedup=s)).total for s in ways)
        assert compiled < plain < recorded_plain and compiled < recorded < recorded_plain

def test_dropout_in_compiled_layers_is_planned():
    "A byte for each number that an adapter reads, and the dropped inputs of queries, keys, values and of the attention's output layer"
    packed = setup(config(tuning="lora"), tokens=8192, loss="fused", attention="flash", speedup="compile", dropout=0.05)
    more = sum(_layer_ledger(SHAPE, packed).values()) - sum(_layer_ledger(SHAPE, replace(packed, dropout=0.0)).values())
    assert more == sum(n for n, _ in _linear_sizes(SHAPE).values()) + 3 * 2 * SHAPE.hidden + 2 * SHAPE.queries

def test_a_layer_keeps_what_the_allocator_saw():
    "Blocks of one layer at the peak of a LoRA step of the 270M on an H100: 7,168 tokens, compiled and recorded, torch 2.11"
    s, mib = setup(load_config("gemma-3-270m", "lora", training=False, bf16=True), tokens=7168), 2**20
    wide, queries, hidden, keys = (7168 * n / mib for n in (2048, 1024, 640, 256))
    # gate, up, product; queries twice, attention's result, the same dropped; into and out of norms, dropped inputs; keys twice, values
    bf16 = 3 * wide + 4 * queries + 9 * hidden + 3 * keys
    masks, adapters, log_sums = wide + queries + 5 * hidden, 7 * 7168 * 16 / mib, 7168 * 4 * 4 / mib
    seen = 2 * bf16 + masks + 2 * adapters + log_sums
    assert s.speedup == "record" and seen == pytest.approx(273.8, abs=0.5), "MiB"
    ledger = _layer_ledger(model_shape(load_config("gemma-3-270m", training=False)), s)
    assert sum(ledger.values()) * 7168 / mib == pytest.approx(seen, rel=0.01)

def test_recorded_steps_are_planned():
    "Peaks of three epochs of the 270M on an H100, all shapes recorded on one stream"
    runs = [r for r in read_json(project_path("results", "benchmark", "command.json"))["runs"] if r["code"] == "after"]
    assert len(runs) == 2
    for r in runs:
        planned = plan_memory(load_config("gemma-3-270m", r["tuning"], training=False, bf16=True)).total
        assert planned == pytest.approx(r["peak_memory"], rel=0.05), r["tuning"]

@pytest.mark.parametrize("preset, tokens", [("gemma-3-270m", "1,342,063"), ("qwen2.5-coder-0.5b", "1,500,394")])
def test_an_epoch_has_the_tokens_of_its_tokenizer(preset, tokens, capsys):
    main(preset, tokens_per_second=1000.0)
    assert f"an epoch of {tokens} tokens" in capsys.readouterr().out

def test_what_was_never_fitted_is_foreseen(tmp_path):
    "Peaks of Qwen runs on GPUs, with compiled layers; none was used in making the ledger of Qwen2"
    unpack(project_path("results", "qwen2.5-coder-1.5b"), tmp_path)
    runs = sorted(path.parent for path in tmp_path.rglob("record.json"))
    assert len(runs) >= 19
    for folder in runs:
        cfg, record = read_config(folder), read_json(folder / "record.json")
        cfg.model.path = None # a folder of the machine it ran on
        assert plan_memory(cfg).total == pytest.approx(record["peak_memory"] - record.get("before", 0), rel=0.05), folder.name

def test_speed_and_time_of_an_epoch(capsys):
    main("gemma-2b-it")
    speeds = {w: float(n.replace(",", "")) for w, n in re.findall(r"^(\w+): ([\d,]+) tokens/s", capsys.readouterr().out, re.M)}
    assert speeds["lora"] > speeds["full"] > 20_000
    main("toy", tokens_per_epoch=1000)
    assert "tokens/s" not in capsys.readouterr().out
    main("gemma-2b-it", tokens_per_second=1000.0, tokens_per_epoch=60_000, dollars_per_hour=2.0)
    assert "as given: 1,000 tokens/s, an epoch of 60,000 tokens: 1.0 minutes, 0.03 dollars" in capsys.readouterr().out
