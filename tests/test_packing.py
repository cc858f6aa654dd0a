"Packed training against padded: loss, gradients, steps, schedule, accumulation, adapters, checkpointing, resume"
import json
import pytest
import torch
from transformers import AutoModelForCausalLM
from gsm8k_sft.core.config import load_config
from gsm8k_sft.data.datasets import Collator
from gsm8k_sft.training.loss import linear_cross_entropy, packed_loss
from gsm8k_sft.generation.kv_cache import plain_prefill
from gsm8k_sft.training.packing import PACKED, Packed, PackedCollator, first_fit
from gsm8k_sft.training.graphs import RecordedStep, compiled_layers, joined_forward, joins, training_mode
from gsm8k_sft.train import load_for_training, train
from gsm8k_sft.training.trainer import build_trainer

SMALL = ("data.train_samples=20 data.test_samples=8 train.per_device_train_batch_size=8 train.num_train_epochs=1 "
         "train.eval_steps=0 train.save_steps=1000 train.logging_steps=1 model.precision=fp32 train.optim=adamw_torch "
         "train.validation_samples=0 data.validation_fraction=0.1 lora_config.lora_dropout=0")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("GSM8K_SFT_PATHS_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("GSM8K_SFT_PATHS_EVAL_RESULTS", str(tmp_path / "eval"))


def run(name, tuning="full", **changes):
    "The log's steps and the trained weights"
    parts = [f"{k.replace('__', '.')}={v}" for k, v in changes.items()]
    cfg = load_config("toy", tuning, overrides=[*SMALL.split(), f"run_name={name}", *parts])
    loaded = load_for_training(cfg)
    from gsm8k_sft.core.runs import run_folder
    folder = run_folder(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    model = loaded.model
    trainer, log, signals = build_trainer(cfg, folder, loaded.tokenizer, loaded.rows, loaded.tokens, model)
    trainer.train()
    signals.restore()
    assert model.config._attn_implementation != PACKED, "attention is as it was"
    return [r for r in log.rows if "loss" in r], {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(a, b, tolerance):
    (log_a, weights_a), (log_b, weights_b) = a, b
    for key in ("step", "learning_rate", "tokens"): assert [r[key] for r in log_a] == [r[key] for r in log_b]
    for key in ("loss", "grad_norm"): assert [r[key] for r in log_a] == pytest.approx([r[key] for r in log_b], rel=tolerance)
    for n, w in weights_a.items(): assert float((w - weights_b[n]).norm() / w.norm().clamp(min=1e-9)) < 50 * tolerance, n


@pytest.mark.parametrize("tuning,checkpointing", [
    ("full", False), ("lora", True), *(pytest.param(*grid, marks=pytest.mark.slow) for grid in (("full", True), ("lora", False)))])
def test_packed_training_is_padded_training(tuning, checkpointing):
    given = {"train__gradient_checkpointing": checkpointing}
    padded = run("padded", tuning, train__packing=False, **given)
    assert [r["step"] for r in padded[0]] == [1, 2, 3], "20 examples, 8 a step, the last step with 4"
    for tokens in (100, 100_000):
        packed = run(f"packed{tokens}", tuning, train__packing=True, train__max_tokens=tokens, **given)
        same(packed, padded, 2e-4)


def test_accumulation_with_unequal_lengths():
    "One batch of 8, eight of 1, and four of 2 put together make the same step"
    whole = run("whole", train__packing=True)
    parts = run("parts", train__packing=True, train__per_device_train_batch_size=1, train__gradient_accumulation_steps=8)
    same(parts, whole, 2e-4)
    same(run("chosen", train__packing=True, train__per_device_train_batch_size=2, train__gradient_accumulation_steps=4,
             train__max_tokens="null"), whole, 2e-4)


def test_validation_loss():
    logs = []
    for packing in (False, True):
        changes = [f"run_name=v{packing}", f"train.packing={packing}", "train.eval_steps=3", "train.max_steps=3",
                   "data.validation_fraction=0.01"]
        cfg = load_config("toy", overrides=[*SMALL.split(), *changes])
        train(cfg, evaluate=False)
        from gsm8k_sft.core.runs import run_folder
        logs.append([json.loads(l) for l in (run_folder(cfg) / "log.jsonl").read_text().splitlines()])
    losses = [[r["eval_loss"] for r in log if "eval_loss" in r] for log in logs]
    assert len(losses[0]) == 1 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    model, loaded = AutoModelForCausalLM.from_pretrained(run_folder(cfg) / "model"), load_for_training(cfg)
    rows = [(torch.tensor([r["input_ids"]]), torch.tensor([r["labels"]])) for r in loaded.tokens["validation"]]
    counts = [int((labels[:, 1:] >= 0).sum()) for _, labels in rows]
    with torch.no_grad(): sums = [model(ids, labels=labels).loss.item() * n for (ids, labels), n in zip(rows, counts)]
    assert losses[0][0] == pytest.approx(sum(sums) / sum(counts), rel=1e-5), "weighed by tokens, not by batches"


def test_saved_weights_know_nothing_of_packing(tmp_path):
    from gsm8k_sft.core.runs import run_folder
    cfg = load_config("toy", overrides=[*SMALL.split(), "run_name=saved", "train.packing=true", "train.max_steps=2"])
    train(cfg, evaluate=False)
    assert "gsm8k" not in (run_folder(cfg) / "model" / "config.json").read_text()


def test_first_fit():
    assert first_fit([], 5) == [] and first_fit([9], 5) == [[0]]
    lengths = [(i * 37) % 90 + 10 for i in range(200)]
    chunks = first_fit(lengths, 256)
    assert sorted(i for c in chunks for i in c) == list(range(200)) and max(sum(lengths[i] for i in c) for c in chunks) <= 256
    assert sum(lengths) / (256 * len(chunks)) > 0.95


def test_loss_in_bf16_and_frozen_head():
    torch.manual_seed(0)
    h, w, t = torch.randn(300, 64), torch.randn(500, 64) * 0.1, torch.randint(500, (300,))
    exact = torch.nn.functional.cross_entropy(h @ w.T, t, reduction="sum")
    hidden = h.clone().requires_grad_()
    loss = linear_cross_entropy(hidden, w, t, dtype=torch.bfloat16, rows=64)
    loss.backward()
    reference = h.clone().requires_grad_()
    torch.nn.functional.cross_entropy(reference @ w.T, t, reduction="sum").backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    assert float((hidden.grad - reference.grad).norm() / reference.grad.norm()) < 1e-2 and w.grad is None


def test_max_tokens_is_a_positive_number():
    with pytest.raises(ValueError, match="train.max_tokens: 0 is outside"): load_config("toy", overrides="train.max_tokens=0")


@pytest.mark.slow # quick: the same gradients below, the Trainer's own packed steps above
@pytest.mark.parametrize("tuning", ["lora"]) # full fine-tuning: in the chapter on speed
def test_traced_layers_train_alike(tuning, monkeypatch):
    "Compiled layers through the whole Trainer; the backend traces and splits, and leaves code generation to the GPU"
    import functools, gsm8k_sft.training.trainer as module
    monkeypatch.setattr(module, "compiled_layers", functools.partial(module.compiled_layers, backend="aot_eager"))
    plain = run("plain", tuning, train__packing=True)
    monkeypatch.setattr(module, "speedup_of", lambda *args: "compile")
    same(run("compiled", tuning, train__packing=True), plain, 2e-4)


@pytest.mark.slow # quick: the gradients of compiled layers in the chapter on graphs
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_layers_are_compiled_once(tuning):
    "Chunks of other lengths, of fewer examples, with a longer example: no new code, and the gradients of layers as they are"
    cfg = load_config("toy", tuning, overrides=[*SMALL.split(), "train.packing=true"])
    loaded = load_for_training(cfg)
    tokens, model = loaded.tokens, loaded.model
    inner, made, counts = model.get_base_model() if tuning == "lora" else model, [], []
    def backend(graph, inputs):
        made.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
    def gradients(chunk, layers):
        model.zero_grad()
        with training_mode(inner, layers): packed_loss(model, inner, chunk).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch._dynamo.reset()
    layers = compiled_layers(inner, backend)
    lengths = sorted(range(18), key=lambda i: len(tokens["train"][i]["input_ids"]))
    for ids in (lengths[:5], lengths[3:8], lengths[5:8], lengths[6:18]):
        chunk = PackedCollator(10**5)([tokens["train"][i] for i in ids])["chunks"][0]
        torch.testing.assert_close(gradients(chunk, layers), gradients(chunk, []), rtol=1e-3, atol=1e-4)
        counts.append(len(made))
    assert counts[0] > 0 and len(set(counts)) == 1, counts


@pytest.fixture
def traceable(monkeypatch):
    "Attention without packed rows, which break the graph on a CPU"
    import gsm8k_sft.training.packing as module
    from torch.nn.functional import scaled_dot_product_attention as attend
    def attention(packed, q, k, v, scale, window, softcap):
        behind = torch.arange(len(q))[:, None] - torch.arange(len(q))
        seen = (behind >= 0) & (behind < (window or len(q)))
        return attend(*(t.transpose(0, 1)[None] for t in (q, k, v)), attn_mask=seen, scale=scale, enable_gqa=True)[0].transpose(0, 1)
    monkeypatch.setattr(module, "_plain", attention)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_compiled_layers_are_checkpointed(tuning, traceable):
    "Between the passes compiled layers keep what plain ones keep with checkpointing: a few inputs; and the gradients are the same"
    cfg = load_config("toy", tuning, overrides=[*SMALL.split(), "train.packing=true", "train.gradient_checkpointing=true"])
    loaded = load_for_training(cfg)
    model, kept = loaded.model, []
    inner = model.get_base_model() if tuning == "lora" else model
    chunk = PackedCollator(10**5)([loaded.tokens["train"][i] for i in range(8)])["chunks"][0]
    def gradients(layers):
        model.zero_grad()
        kept.append(0)
        def keep(tensor):
            kept[-1] += tensor.nbytes
            return tensor
        with training_mode(inner, layers):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor): loss = packed_loss(model, inner, chunk)
            loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch._dynamo.reset()
    compiled = compiled_layers(inner, "aot_eager")
    torch.testing.assert_close(gradients(compiled), gradients([]), rtol=1e-3, atol=1e-4)
    assert all(layer.gradient_checkpointing for layer in inner.get_decoder().layers), "as it was"
    for layer in inner.get_decoder().layers: layer.gradient_checkpointing = False
    gradients([])
    assert kept[0] <= 1.01 * kept[1] < 0.3 * kept[2], kept


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_layers_share_one_graph(tuning, traceable):
    "The first layer, whose input needs no gradient, and those with a window and without: each other graph costs seconds of compiling"
    from gsm8k_sft.models.adapters import prepare_for_training
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    torch.manual_seed(0)
    shape = dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                 num_hidden_layers=3, sliding_window=5, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    cfg = load_config("gemma-3-270m", tuning, training=False, overrides="lora_config.lora_dropout=0 lora_config.init_lora_weights=false")
    model = prepare_for_training(Gemma3ForCausalLM(Gemma3TextConfig(**shape)), cfg)
    made, inner = [], model.get_base_model() if tuning == "lora" else model
    ids = torch.randint(5, 99, (40,))
    chunk = PackedCollator(100)([{"input_ids": ids, "labels": ids}])["chunks"][0]
    def gradients(layers):
        model.zero_grad()
        with training_mode(inner, layers): packed_loss(model, inner, chunk).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch._dynamo.reset()
    layers = compiled_layers(inner, lambda graph, inputs: made.append(graph) or graph)
    torch.testing.assert_close(gradients(layers), gradients([]), rtol=1e-3, atol=1e-4)
    assert len(made) == 1 and sum(name == "forward" for _, name, _ in layers) == 2 * 3 * (tuning == "lora"), "gate_proj and up_proj"


@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 0.3}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}])
@pytest.mark.parametrize("bias", [False, True])
def test_joined_products_are_the_layer(lora, bias):
    "Where a LoRA layer is computed as one product, it gives what peft's gives; where it would not, it isn't"
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    given = LoraConfig(r=4, lora_alpha=3, target_modules=["0"], init_lora_weights=False, **lora)
    layer = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 48, bias=bias)), given).base_model.model[0].train()
    assert joins(layer) == (not bias and not {"use_dora", "lora_bias"} & set(lora))
    if not joins(layer): return
    x, learns = torch.randn(2, 7, 16, requires_grad=True), [p for p in layer.parameters() if p.requires_grad]
    def found(forward):
        torch.manual_seed(1) # the same dropout
        y = forward(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *learns])]
    for a, b in zip(found(layer), found(lambda x: joined_forward(layer, x))): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [[4096, 4096], [8192], [8191], [1000] * 9, [5000, 3191, 1], [2048] * 5])
def test_filled_chunks_end_at_max_tokens(lengths):
    "Unless a single example is longer than that with its filling"
    examples = [{"input_ids": [5] * n, "labels": [5] * n} for n in lengths]
    sizes = [c["input_ids"].shape[1] for c in PackedCollator(8192, 1024, 1024)(examples)["chunks"]]
    assert all(n % 1024 == 0 for n in sizes) and sum(sizes) > sum(lengths)
    assert max(sizes) <= 8192 or max(lengths) > 8191


def test_filled_chunks_train_alike(monkeypatch):
    "What is recorded on a GPU, launched one by one here"
    import gsm8k_sft.training.trainer as module
    given = dict(train__packing=True, train__max_tokens=600, train__max_steps=2,
                 train__gradient_accumulation_steps=2, train__per_device_train_batch_size=4)
    plain = run("plain", **given)
    monkeypatch.setattr(module, "speedup_of", lambda *args: "record")
    monkeypatch.setattr(module, "RecordedStep", lambda loss, parameters: RecordedStep(loss, parameters, recorded=False))
    same(run("filled", **given), plain, 2e-4)


def test_steps_that_memory_does_not_suffice_to_record_go_on_unrecorded(monkeypatch, capsys):
    "Each step is launched, none twice; the run's record and its output say so"
    import gsm8k_sft.training.trainer as module
    given = dict(train__packing=True, train__max_tokens=600, train__max_steps=2,
                 train__gradient_accumulation_steps=2, train__per_device_train_batch_size=4)
    plain, made, built = run("plain", **given), [], []
    monkeypatch.setitem(globals(), "build_trainer", lambda *args: built.append(module.build_trainer(*args)) or built[-1])
    monkeypatch.setattr(module, "speedup_of", lambda *args: "record")
    def short(self, chunk):
        made.append(self)
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(RecordedStep, "record", short)
    same(run("short", **given), plain, 2e-4)
    assert len(made) == 1 and not (made[0].recorded or made[0].graphs or made[0].pool)
    assert capsys.readouterr().out.count("steps go on unrecorded") == 1 and "out of GPU memory" in built[0][0].fast_path["recording"]


def test_another_error_of_a_recording_ends_the_run():
    class Wrong(RecordedStep):
        def record(self, chunk): raise RuntimeError("an illegal memory access")
    layer = torch.nn.Linear(2, 2)
    step, one = Wrong(lambda chunk: layer(chunk["x"]).sum(), layer.parameters()), torch.ones(1, 2)
    step.start()
    with pytest.raises(RuntimeError, match="illegal"): step({"x": one, "input_ids": one, "targets": one, "bounds": one, "longest": 1}, 1.0)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

def to_gpu(batch): return {k: v.cuda() if torch.is_tensor(v) else v for k, v in batch.items()}


@gpu
def test_gpu_another_recorded_shape_keeps_no_more_memory():
    "cuBLAS keeps 32 MiB and more for each stream and thread that multiplies"
    layer, held = torch.nn.Linear(512, 512).cuda(), []
    step = RecordedStep(lambda chunk: layer(chunk["x"]).square().mean(), layer.parameters())
    for n in (64, 128, 192, 256):
        step.start()
        x, count = torch.randn(n, 512, device="cuda"), torch.zeros(n, device="cuda")
        step({"x": x, "input_ids": count[None], "targets": count, "bounds": count, "longest": n}, 1.0)
        held.append(torch.cuda.memory_allocated())
    assert held[-1] - held[0] < 2**22, held


@gpu
def test_gpu_a_recording_that_is_short_of_memory_leaves_nothing_half_recorded():
    "In the recording, and in the runs before it: gradients and random numbers are as before, and the same step is launched instead"
    layer = torch.nn.Linear(512, 512).cuda()
    for at in (1, 3):
        calls = []
        def loss(chunk):
            calls.append(0)
            out = torch.nn.functional.dropout(layer(chunk["x"])).square().mean()
            if len(calls) == at: torch.empty(2**50, device="cuda")
            return out
        x, count = torch.randn(64, 512, device="cuda"), torch.zeros(64, device="cuda")
        chunk, found = {"x": x, "input_ids": count[None], "targets": count, "bounds": count, "longest": 64}, []
        for recorded in (True, False):
            layer.zero_grad()
            torch.manual_seed(0)
            step = RecordedStep(loss, layer.parameters(), recorded=recorded)
            step.start()
            found.append((step(chunk, 1.0).item(), layer.weight.grad.clone(), torch.cuda.get_rng_state()))
            assert not step.graphs and torch.cuda.current_stream() == torch.cuda.default_stream()
        assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1]) and torch.equal(found[0][2], found[1][2])


@gpu
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("speedup", ["none", "compile"])
def test_gpu_bf16_gradients(tuning, speedup):
    "The packed step in bf16 is at most a quarter further from the plain fp32 step than transformers' own in bf16"
    cfg = load_config("toy", tuning, overrides=[*SMALL.split(), "model.precision=fp32"])
    loaded = load_for_training(cfg)
    tokens, model = loaded.tokens, loaded.model.cuda().train()
    inner = model.get_base_model() if tuning == "lora" else model
    examples = [tokens["train"][i] for i in range(8)]
    chunk, batch = to_gpu(PackedCollator(10**5)(examples)["chunks"][0]), to_gpu(Collator(0)(examples))
    def gradient(loss, bf16):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16): value = loss(bf16)
        value.backward()
        return value.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    def padded(bf16): return model(**batch).loss * len(chunk["targets"])
    def packed(bf16): return packed_loss(model, inner, chunk, torch.bfloat16 if bf16 else None)
    loss, exact = gradient(padded, False)
    _, usual = gradient(padded, True)
    with training_mode(inner, compiled_layers(inner) if speedup == "compile" else []): rough, found = gradient(packed, True)
    error = lambda g: float((g - exact).norm() / exact.norm())
    assert rough == pytest.approx(loss, rel=1e-2) and error(found) < 1.25 * error(usual), (rough, loss, error(found), error(usual))


@gpu
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("speedup", ["compile", "record"])
def test_gpu_speedups_train_alike(tuning, speedup):
    "Compiled and recorded steps against packed ones that are neither; afterwards the model answers as ever"
    mixed = dict(train__packing=True, model__precision="mixed", train__max_tokens=600)
    plain, fast = run("plain", tuning, **mixed, train__speedup="none"), run(speedup, tuning, **mixed, train__speedup=speedup)
    for key, bound in (("loss", 1e-2), ("grad_norm", 6e-2)): # two runs in bf16, three steps apart; a single gradient is held to fp32 above
        assert [r[key] for r in fast[0]] == pytest.approx([r[key] for r in plain[0]], rel=bound)
    assert [r["tokens"] for r in fast[0]] == [r["tokens"] for r in plain[0]]


@gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("speedup", ["none", "compile"])
def test_gpu_soft_cap(speedup, checkpointing, monkeypatch):
    """Gemma 2's capped scores by FlexAttention: in bf16 no further from fp32 than the plain way in bf16.
    Chunks of several lengths, a window shorter than the examples"""
    from gsm8k_sft.training import packing
    from transformers import Gemma2Config, Gemma2ForCausalLM
    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=64, sliding_window=70, query_pre_attn_scalar=1,
                          attn_logit_softcapping=2.0, attn_implementation="eager")
    model = Gemma2ForCausalLM(config).cuda().train()
    if checkpointing: model.gradient_checkpointing_enable({"use_reentrant": False})
    draw = lambda n: {"input_ids": (ids := torch.randint(5, 300, (n,)).tolist()), "labels": [-100] * (n // 2) + ids[n // 2:]}
    examples = [draw(n) for n in (30, 200, 500, 7, 130, 300, 129, 128, 400)]
    chunks = [to_gpu(c) for c in PackedCollator(900)(examples)["chunks"]]
    def gradient(bf16, compiled=()):
        dtype = torch.bfloat16 if bf16 else None
        model.zero_grad()
        with training_mode(model, compiled):
            for c in chunks:
                with torch.autocast("cuda", torch.bfloat16, enabled=bf16): loss = packed_loss(model, model, c, dtype)
                loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    found = gradient(True, compiled_layers(model) if speedup == "compile" else [])
    assert packing.soft_cap_blocks(config, chunks[0]), "FlexAttention was used"
    monkeypatch.setattr(packing, "soft_cap_blocks", lambda *args: {})
    exact, plain = gradient(False), gradient(True)
    error = lambda g: float((g - exact).norm() / exact.norm())
    assert error(found) < 1.25 * error(plain), (error(found), error(plain))


def test_plain_attention_has_one_shape_whatever_the_examples_are():
    "A CUDA graph can record it: nothing waits for the lengths, which fake tensors don't have"
    from torch._subclasses.fake_tensor import FakeTensorMode
    packed, (q, k, v) = Packed(torch.tensor([0, 3, 5, 5, 8], dtype=torch.int32), 4), torch.randn(3, 8, 2, 16)
    found = plain_prefill(packed, q, k, v, 0.25, None, None)
    for own in (slice(0, 3), slice(3, 5), slice(5, 8)):
        only = Packed(torch.tensor([0, own.stop - own.start], dtype=torch.int32), 3)
        alone = plain_prefill(only, q[own], k[own], v[own], 0.25, None, None)
        torch.testing.assert_close(found[own], alone)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        bounds, *same = (fake.from_tensor(t) for t in (packed.bounds, q, k, v))
        assert plain_prefill(Packed(bounds, 4), *same, 0.25, 2, None).shape == found.shape
