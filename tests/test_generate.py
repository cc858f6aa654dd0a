"Generation: the state it leaves, memory, adapters, precisions and architectures"
import gc, logging, random
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GemmaConfig, GemmaForCausalLM
from gsm8k_sft.data.synthetic import toy_model_path
from gsm8k_sft.generation import batches
from gsm8k_sft.generation.batches import Request, answer_batch
from gsm8k_sft.generation.calculator import Calculator
from gsm8k_sft.generation.checks import engine_fault, padding_fault
from gsm8k_sft.generation.engine import Engine, engine_answers
from gsm8k_sft.generation.generate import generate
from gsm8k_sft.generation.kv_cache import IMPLEMENTATION, SlotCache, cache_argument
from gsm8k_sft.generation.sampling import GenerationError, Sampling
from gsm8k_sft.models.loading import load_weights

SMALL = dict(vocab_size=768, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
             num_key_value_heads=1, head_dim=16, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=2)
WINDOW = dict(SMALL, sliding_window=16, query_pre_attn_scalar=16)
MODELS = {
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SMALL)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**WINDOW, attn_implementation="eager")),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**WINDOW, layer_types=["sliding_attention", "full_attention"] * 2)),
}
LENGTHS = (40, 7, 23, 16, 17, 3)


@pytest.fixture(scope="module")
def tokenizer(): return AutoTokenizer.from_pretrained(toy_model_path())


def make(kind="gemma3", scale=16):
    "A random model; with large weights its answers wander, with small ones it repeats its last token"
    torch.manual_seed(1)
    model = MODELS[kind]().eval()
    for p in model.model.layers.parameters(): p.data.mul_(scale)
    return model


def prompts(lengths=LENGTHS):
    source = random.Random(0)
    return [[2] + [source.randrange(10, 700) for _ in range(n)] for n in lengths]


def alone(model, ids, n, stop):
    "transformers' own generate, one row, nothing padded"
    settings = dict(max_new_tokens=n, do_sample=False, eos_token_id=stop or None, pad_token_id=0)
    return model.generate(input_ids=torch.tensor([ids]), **settings)[0, len(ids):].tolist()


def slots(model, ids, n, stop, rows=6, **settings):
    "The engine's answers, in the prompts' order"
    requests = [Request(i, row) for i, row in enumerate(ids)]
    found = {r.index: new for r, new, _ in engine_answers(model, requests, n, stop, rows, **settings)}
    return [found[i] for i in range(len(ids))]


def sampled(model, ids, sampling):
    "What the engine draws for each prompt, four rows at a time"
    requests = [Request(i, row, sampling.uniform(str(i), 21)) for i, row in enumerate(ids)]
    return {r.index: new for r, new, _ in engine_answers(model, requests, 20, [1], 4, sampling=sampling)}


@pytest.mark.parametrize("kind", MODELS)
def test_slots_equal_one_at_a_time(kind):
    "More prompts than rows, rows that stop at different times and are filled again, prompts and answers beyond the window of 16"
    model, ids = make(kind), prompts((40, 7, 23, 16, 17, 3, 60, 1, 33, 15))
    free = [alone(model, row, 40, []) for row in ids]
    cut = lambda token: {(row + [token]).index(token) for row in free}
    stop = [max({t for row in free for t in row}, key=lambda t: len(cut(t)))]
    expected = [alone(model, row, 40, stop) for row in ids]
    assert len({len(e) for e in expected}) > 2, "the rows should stop at different times"
    for rows in (1, 3, 10): assert slots(model, ids, 40, stop, rows) == expected
    assert slots(model, ids, 1, stop) == [e[:1] for e in expected]


@pytest.mark.parametrize("kind", MODELS)
def test_batch_equals_one_at_a_time(kind, tokenizer):
    model, ids = make(kind), prompts()
    free = [alone(model, row, 40, []) for row in ids]
    stop = [free[0][30], free[1][12], free[2][11]]
    expected = [alone(model, row, 40, stop) for row in ids]
    assert len({len(e) for e in expected}) > 2, "the rows should stop at different times"
    assert [new for new, _ in answer_batch(model, tokenizer, ids, 40, stop)] == expected


def test_pad_is_a_stop_token(tokenizer):
    model, ids = make(), prompts()
    stop = [alone(model, ids[1], 20, [])[5]]
    expected = [alone(model, row, 20, stop) for row in ids]
    pad, tokenizer.pad_token = tokenizer.pad_token, tokenizer.convert_ids_to_tokens(stop[0])
    try: found = answer_batch(model, tokenizer, ids, 20, stop)
    finally: tokenizer.pad_token = pad
    assert [new for new, _ in found] == expected
    assert [why for _, why in found] == ["stop" if e[-1] == stop[0] else "length" for e in expected]


def test_state_is_restored(tokenizer):
    model = make()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train().model.layers[1].eval()
    model.config.use_cache = False
    model.generation_config.update(do_sample=True, top_k=64, top_p=0.95)
    modes, before = [m.training for m in model.modules()], model.generation_config
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    draws = lambda: (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    state, side = draws(), tokenizer.padding_side
    trained = answer_batch(model, tokenizer, prompts(), 12, [1])
    assert slots(model, prompts(), 12, [1]) == [new for new, _ in trained]
    assert draws() == state and tokenizer.padding_side == side
    assert [m.training for m in model.modules()] == modes and model.is_gradient_checkpointing
    assert model.generation_config is before and before.top_k == 64 and model.config.use_cache is False
    assert trained == answer_batch(make(), tokenizer, prompts(), 12, [1])


def test_state_is_restored_after_an_error(tokenizer, monkeypatch):
    model = make().train()
    monkeypatch.setattr(model, "generate", lambda **k: 1 / 0)
    with pytest.raises(ZeroDivisionError): answer_batch(model, tokenizer, prompts(), 4, [1])
    assert model.training


def test_no_warnings(tokenizer, caplog, recwarn):
    model = make()
    model.generation_config.update(do_sample=True, top_k=64, top_p=0.95, temperature=0.7)
    logging.getLogger("transformers").propagate = True
    list(generate(model, tokenizer, ["<bos>Hello", "<bos>Hello you"], 4, 2, [1], progress=False))
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert not [w for w in recwarn if "generat" in str(w.message).lower()]


@pytest.mark.parametrize("engine", ["slots", "transformers"])
def test_out_of_memory_halves_the_rows(engine, tokenizer, monkeypatch, capsys):
    model, asked, step, batch = make(), [], Engine.decode, answer_batch
    texts = ["<bos>" + "Tom has 3 apples. " * n for n in (1, 5, 2, 4, 3, 1, 2)]
    expected = {g.index: g.text for g in generate(model, tokenizer, texts, 4, 1, [1], progress=False)}
    def full(n, most):
        asked.append(n)
        if n > most: raise torch.OutOfMemoryError("CUDA out of memory")
    def limit(most):
        monkeypatch.setattr(Engine, "decode", lambda self, steps: (full(self.rows, most), step(self, steps))[1])
        monkeypatch.setattr(batches, "answer_batch", lambda m, t, ids, *args: (full(len(ids), most), batch(m, t, ids, *args))[1])
    ask = lambda: list(generate(model, tokenizer, texts, 4, 7, [1], progress=False, engine=engine))
    limit(2)
    found = ask()
    assert {g.index: g.text for g in found} == expected and list(dict.fromkeys(asked))[:3] == [7, 3, 1]
    assert {g.batch_size for g in found} == {1} and "going on with 3" in capsys.readouterr().out
    limit(0)
    with pytest.raises(GenerationError, match="too small for a single prompt"): ask()


def test_answers_kept_from_before_memory_ran_out(tokenizer, monkeypatch):
    "What had ended before the error isn't asked again"
    model, step, calls = make(), Engine.decode, []
    ids = prompts((5, 9, 12, 3))
    stop = [alone(model, ids[0], 3, [])[1]]
    def decode(self, steps):
        calls.append(len(self.requests))
        if len(calls) == 8: raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, steps)
    monkeypatch.setattr(Engine, "decode", decode)
    assert slots(model, ids, 20, stop, 4) == [alone(model, row, 20, stop) for row in ids]
    assert calls[0] == 4 and calls[7] < 4


def test_the_engine_is_gone_with_the_last_answer():
    "Without waiting for the garbage collector: its memory goes back to the GPU then"
    def engines(): return [o for o in gc.get_objects() if isinstance(o, Engine)]
    gc.collect(), gc.disable()
    try:
        before, model = len(engines()), make()
        answers = engine_answers(model, [Request(i, ids) for i, ids in enumerate(prompts())], 10, [], 2)
        next(answers)
        assert len(engines()) == before + 1
        assert list(answers) and len(engines()) == before
    finally: gc.enable()


def test_longest_first_and_quiet(tokenizer, capfd):
    texts = ["<bos>" + "Tom has 3 apples. " * n for n in (1, 5, 2, 4)]
    found = list(generate(make(), tokenizer, texts, 3, 1, [], progress=False))
    assert [g.index for g in found] == [1, 3, 2, 0]
    assert capfd.readouterr() == ("", "")


def test_time_is_shared_out(tokenizer, monkeypatch):
    "A clock that goes on by a second a step: the answers' seconds add up to the steps"
    from gsm8k_sft.generation import engine
    texts = ["<bos>" + "Tom has 3 apples. " * n for n in (1, 5, 2, 4)]
    list(generate(make(), tokenizer, texts, 30, 3, [1], progress=False)) # the check of the engine takes steps of its own
    now, step = [0.0], Engine.step
    monkeypatch.setattr(engine, "time", type("clock", (), {"perf_counter": lambda: now[0]}))
    def timed(self, n): now[0] += 1; return step(self, n)
    monkeypatch.setattr(Engine, "step", timed)
    found = list(generate(make(), tokenizer, texts, 30, 3, [1], progress=False))
    assert now[0] > 30 and sum(g.seconds for g in found) == pytest.approx(now[0]) and min(g.seconds for g in found) > 5


def test_draws_follow_the_probabilities():
    "Shares of 20,000 draws against the probabilities, temperature and top_p applied by hand"
    logits, uniform = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (1.0, 0.6)):
        p = (logits[0] / temperature).softmax(-1).tolist()
        kept, total = [], 0.0
        for i in sorted(range(4), key=lambda i: -p[i]):
            if total < top_p: kept.append(i)
            total += p[i]
        expected = [p[i] / sum(p[k] for k in kept) if i in kept else 0 for i in range(4)]
        shares = Sampling(temperature, top_p).draw(logits.expand(20_000, 4), uniform).bincount(minlength=4) / 20_000
        assert shares.tolist() == pytest.approx(expected, abs=0.012)


def test_low_temperature_is_greedy():
    model, ids = make(), prompts()
    found = sampled(model, ids, Sampling(temperature=1e-7))
    assert [found[i] for i in range(len(ids))] == [alone(model, row, 20, [1]) for row in ids]


def test_draws_depend_on_seed_and_name_only(tokenizer):
    model, texts = make(), ["<bos>Tom", "<bos>Tom has 3 apples", "<bos>Tom"]
    def drawn(rows, names, seed=0):
        found = generate(model, tokenizer, texts, 12, rows, [1], names, progress=False, sampling=Sampling(1.0, 0.9, seed))
        return [g.text for g in sorted(found, key=lambda g: g.index)]
    assert drawn(3, "abc") == drawn(1, "abc") and drawn(3, "aba")[0] == drawn(3, "aba")[2]
    assert drawn(3, "abc") != drawn(3, "abc", seed=1) and drawn(3, "abc")[0] != drawn(3, "abc")[2]


def test_calculator_by_hand(tokenizer):
    "Batched and paused rows give what one row alone gives, where results are put in by a loop nobody can doubt"
    from gsm8k_sft.core.config import load_config
    from gsm8k_sft.data.prompts import Renderer
    from gsm8k_sft.models.loading import load_model
    model, renderer = load_model(load_config("toy"), dtype="fp32").eval(), Renderer(tokenizer)
    texts = [renderer.prompt(q) for q in ("3*8, 50-9", "7*6, 12+5, 90-18, 64/8", "6+7, 14/2, 9*9")]
    fill = lambda text: "11" if text.rstrip().endswith(("8=", "5=", "2=")) else None
    def by_hand(ids, n):
        new = []
        while len(new) < n and (not new or new[-1] not in renderer.stop_ids):
            with torch.no_grad(): new.append(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax().item())
            text = tokenizer.decode(new)
            if text.endswith("=") and (result := fill(text)): new += tokenizer(result, add_special_tokens=False)["input_ids"]
        return new[:n]
    expected = [tokenizer.decode(by_hand(tokenizer(t, add_special_tokens=False)["input_ids"], 40), skip_special_tokens=True) for t in texts]
    assert sum("=11" in e for e in expected) == 3
    for rows in (1, 2, 3):
        found = generate(model, tokenizer, texts, 40, rows, renderer.stop_ids, progress=False, calculator=Calculator(tokenizer, fill))
        assert [g.text for g in sorted(found, key=lambda g: g.index)] == expected


def test_a_text_ends_an_answer_and_frees_its_row(tokenizer, monkeypatch):
    "Cut where the text begins, whatever the rows, beside a calculator too; and the rows don't run on to the limit"
    model, texts, steps = make(scale=4), [tokenizer.decode(p) for p in prompts()], []
    free = {g.index: g.text for g in generate(model, tokenizer, texts, 200, 6, [], progress=False)}
    letters = [c for c in "etaoinsr" if sum(c in text[:40] for text in free.values()) >= 4]
    assert letters, "most answers should hold the text early"
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self, n: (steps.append(n), step(self, n))[1])
    for rows, calculator in ((6, None), (2, None), (6, Calculator(tokenizer, lambda text: None))):
        steps.clear()
        found = list(generate(model, tokenizer, texts, 200, rows, [], progress=False, calculator=calculator, stop_texts=letters))
        for g in found:
            at = min((free[g.index].find(c) for c in letters if c in free[g.index]), default=len(free[g.index]))
            assert g.text == free[g.index][:at] and g.finish_reason == ("stop" if at < len(free[g.index]) else "length")
        assert sum(steps) < 1.2 * sum(g.n_tokens for g in found), "no row does much more than its answer took"


def test_what_transformers_engine_lacks(tokenizer):
    with pytest.raises(GenerationError, match="use engine=slots"):
        generate(make(), tokenizer, ["<bos>a"], 3, 1, [1], sampling=Sampling(), engine="transformers")
    with pytest.raises(GenerationError, match="top_p"): Sampling(1.0, 0.0)


def test_context_names_the_item(tokenizer):
    text = "<bos>" + "Tom has 3 apples. " * 60
    with pytest.raises(GenerationError, match="^main/test/5: .*256 positions"):
        generate(make(), tokenizer, ["<bos>", text], 8, 2, [1], names=["a", "main/test/5"])


@pytest.mark.parametrize("kind", ["gemma", "gemma3"])
def test_adapter_in_training(kind, tokenizer):
    from peft import LoraConfig, get_peft_model
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(make(kind), lora)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found, slotted = answer_batch(model.train(), tokenizer, prompts(), 12, [1]), slots(model, prompts(), 12, [1])
    assert model.training
    expected = [alone(model.eval(), row, 12, [1]) for row in prompts()]
    assert [new for new, _ in found] == expected and slotted == expected
    assert slots(model.merge_and_unload(), prompts(), 12, [1]) == expected


@pytest.mark.parametrize("cast", ["weights", "autocast"])
def test_bf16(cast, tokenizer):
    model = make().bfloat16() if cast == "weights" else make()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        found, slotted = answer_batch(model, tokenizer, prompts(), 6, [1]), slots(model, prompts(), 6, [1])
    assert all(1 <= len(new) <= 6 for new in slotted)
    assert len(found) == len(LENGTHS) and all(1 <= len(new) <= 6 for new, _ in found)


def test_training_goes_on_after_generating(tokenizer):
    "The loss and gradients after an evaluation are those without it"
    def gradient(answers):
        model = make().train()
        torch.manual_seed(5)
        if answers: answer_batch(model, tokenizer, prompts(), 4, [1]), slots(model, prompts(), 4, [1])
        ids = torch.tensor([prompts()[0]])
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(gradient(False), gradient(True)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu(tokenizer):
    model, ids = make().cuda(), prompts()
    reference = [alone(make(), row, 20, [1]) for row in ids]
    assert [new for new, _ in answer_batch(model, tokenizer, ids, 20, [1])] == reference
    assert slots(model, ids, 20, [1]) == reference
    assert len(answer_batch(model.bfloat16(), tokenizer, ids * 100, 20, [1])) == 600


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", MODELS)
def test_gpu_recorded_steps(kind):
    "bf16, recorded, filled again, shrunk to smaller recordings: the first tokens are those of one row alone"
    model, ids = make(kind, scale=2).cuda().bfloat16(), prompts([5 + i % 40 for i in range(90)])
    settings = dict(max_new_tokens=30, do_sample=False, eos_token_id=1, pad_token_id=0)
    one = lambda row: model.generate(input_ids=torch.tensor([row], device="cuda"), **settings)[0, len(row):].tolist()
    found = slots(model, ids, 30, [1], 64)
    same = [found[i][:5] == one(ids[i])[:5] for i in range(0, 90, 11)]
    assert sum(same) >= 8 and all(len(new) <= 30 for new in found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_cache():
    "Prefill and one step through FlashAttention in bf16, against whole texts in fp32"
    model, texts = make(scale=2), [torch.tensor(p) for p in prompts((30, 12))]
    with torch.no_grad(): reference = torch.stack([model(input_ids=t[None]).logits[0, -1] for t in texts])
    model, cache = model.cuda().bfloat16(), SlotCache(rows=2, length=40)
    model.config._attn_implementation = IMPLEMENTATION
    def run(ids):
        given = dict(input_ids=ids.cuda()[None], position_ids=cache.position[None], slot_cache=cache, **{cache_argument(model): cache})
        with torch.no_grad(): return model(**given).logits[0]
    cache.prefill(rows=[1, 0], counts=[30, 12], device="cuda")
    run(torch.cat([t[:-1] for t in texts]))
    cache.decode(torch.tensor([1, 0]).cuda(), torch.tensor([30, 12]).cuda())
    assert torch.allclose(run(torch.stack([t[-1] for t in texts])).float().cpu(), reference, atol=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_drawn_as_on_the_cpu():
    on_cpu, on_gpu = (sampled(make().to(device), prompts(), Sampling(0.7, 0.9)) for device in ("cpu", "cuda"))
    assert on_cpu == on_gpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_out_of_memory_for_real(tokenizer, capsys):
    model, ids = make().cuda(), ["<bos>" + "Tom has 3 apples. " * 30] * 4096
    torch.cuda.set_per_process_memory_fraction(2**29 / torch.cuda.get_device_properties(0).total_memory)
    try: found = list(generate(model, tokenizer, ids, 4, 4096, [1], progress=False))
    finally: torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(found) == 4096 and "out of GPU memory" in capsys.readouterr().out


@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", id="gpu", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU"))])
def test_long_prompts_in_fp32(head_dim, device):
    "Beyond a window and a block of keys, with one prompt's slots longer than the other's"
    config = Gemma3TextConfig(**WINDOW | {"head_dim": head_dim}, layer_types=["sliding_attention", "full_attention"] * 2)
    torch.manual_seed(1)
    model = Gemma3ForCausalLM(config).eval().to(device)
    for p in model.model.layers.parameters(): p.data.mul_(16)
    assert engine_fault(model, prompts((241, 121))) == "" == engine_fault(model, prompts((70, 9)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_padded_batches_with_one_key_head(tokenizer, tmp_path):
    "Where torch's memory-efficient kernel is wrong in the last row: a batch of 65 or 129 tokens in fp32"
    make().save_pretrained(tmp_path)
    model = load_weights(tmp_path, "fp32")
    assert model.device.type == "cuda" and [padding_fault(model, tokenizer, prompts((n, 9))) for n in (63, 64, 128)] == ["", "", ""]


def test_what_a_generation_config_asks_for_and_does_not_get_is_said(tokenizer, capsys):
    model = make("gemma", 1)
    answers = []
    for penalty in (None, 1.37):
        if penalty: model.generation_config.update(repetition_penalty=penalty, num_beams=1, do_sample=True, top_p=0.9)
        answers.append([g.text for g in generate(model, tokenizer, ["<bos>3*8"], 5, 1, [1], progress=False)])
        assert ("asks for repetition_penalty=1.37: left out" in capsys.readouterr().err) is bool(penalty)
    assert answers[0] == answers[1]


def test_a_model_that_cannot_be_run_is_one_sentence(tokenizer):
    model = make("gemma", 1)
    model.model.layers[0].mlp.down_proj.weight.data = torch.ones(32, 63)
    with pytest.raises(GenerationError, match="GemmaForCausalLM can't be answered: transformers' own generate fails"):
        list(generate(model, tokenizer, ["<bos>3*8"], 5, 1, [1], progress=False, engine="transformers"))
