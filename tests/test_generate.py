"Generation: the state it leaves, memory, adapters, precisions and architectures"
import logging, random
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GemmaConfig, GemmaForCausalLM
from gsm8k_sft import generate as module
from gsm8k_sft.generate import GenerationError, answer_batch, generate, generate_batches
from gsm8k_sft.synthetic import toy_model_path

SMALL = dict(vocab_size=768, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
             max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=2)
WINDOW = dict(SMALL, sliding_window=16, query_pre_attn_scalar=16)
MODELS = {"gemma": lambda: GemmaForCausalLM(GemmaConfig(**SMALL)), "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**WINDOW, attn_implementation="eager")),
          "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**WINDOW, layer_types=["sliding_attention", "full_attention"] * 2))}
LENGTHS = (40, 7, 23, 16, 17, 3)


@pytest.fixture(scope="module")
def tokenizer(): return AutoTokenizer.from_pretrained(toy_model_path())


def make(kind="gemma3"):
    torch.manual_seed(1)
    return MODELS[kind]().eval()


def prompts(lengths=LENGTHS):
    source = random.Random(0)
    return [[2] + [source.randrange(10, 700) for _ in range(n)] for n in lengths]


def alone(model, ids, n, stop):
    "transformers' own generate, one row, nothing padded"
    out = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=n, do_sample=False, eos_token_id=stop or None, pad_token_id=0)[0, len(ids):].tolist()
    return out


@pytest.mark.parametrize("kind", MODELS)
def test_batch_equals_one_at_a_time(kind, tokenizer):
    model, ids = make(kind), prompts()
    free = [alone(model, row, 40, []) for row in ids]
    stop = [free[0][30], free[1][2], free[2][11]]
    expected = [alone(model, row, 40, stop) for row in ids]
    assert len({len(e) for e in expected}) > 1, "the rows should stop at different times"
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
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING] and not [w for w in recwarn if "generat" in str(w.message).lower()]


def test_out_of_memory_halves_the_batch(tokenizer, monkeypatch, capsys):
    model, asked = make(), []
    def limited(m, t, ids, *args):
        asked.append(len(ids))
        if len(ids) > 2: raise torch.OutOfMemoryError("CUDA out of memory")
        return answer_batch(m, t, ids, *args)
    monkeypatch.setattr(module, "answer_batch", limited)
    texts = ["<bos>" + "Tom has 3 apples. " * n for n in (1, 5, 2, 4, 3, 1, 2)]
    found = list(generate(model, tokenizer, texts, 4, 7, [1], progress=False))
    assert sorted(g.index for g in found) == list(range(7)) and asked[:3] == [7, 3, 1]
    assert {g.batch_size for g in found} == {1} and "going on with 3" in capsys.readouterr().out
    monkeypatch.setattr(module, "answer_batch", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(GenerationError, match="too small for a single prompt"): list(generate(model, tokenizer, texts, 4, 7, [1], progress=False))


def test_longest_first_and_quiet(tokenizer, capfd):
    texts = ["<bos>" + "Tom has 3 apples. " * n for n in (1, 5, 2, 4)]
    batches = list(generate_batches(make(), tokenizer, texts, 3, 2, [1], progress=False))
    assert [[g.index for g in b] for b in batches] == [[1, 3], [2, 0]]
    assert capfd.readouterr() == ("", "")


def test_context_names_the_item(tokenizer):
    text = "<bos>" + "Tom has 3 apples. " * 60
    with pytest.raises(GenerationError, match="^main/test/5: .*256 positions"): generate(make(), tokenizer, ["<bos>", text], 8, 2, [1], names=["a", "main/test/5"])


@pytest.mark.parametrize("kind", ["gemma", "gemma3"])
def test_adapter_in_training(kind, tokenizer):
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(make(kind), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False, task_type="CAUSAL_LM"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = answer_batch(model.train(), tokenizer, prompts(), 12, [1])
    assert model.training
    assert [new for new, _ in found] == [alone(model.eval(), row, 12, [1]) for row in prompts()]


@pytest.mark.parametrize("cast", ["weights", "autocast"])
def test_bf16(cast, tokenizer):
    model = make().bfloat16() if cast == "weights" else make()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"): found = answer_batch(model, tokenizer, prompts(), 6, [1])
    assert len(found) == len(LENGTHS) and all(1 <= len(new) <= 6 for new, _ in found)


def test_training_goes_on_after_generating(tokenizer):
    "The loss and gradients after an evaluation are those without it"
    def gradient(answers):
        model = make().train()
        torch.manual_seed(5)
        if answers: answer_batch(model, tokenizer, prompts(), 4, [1])
        ids = torch.tensor([prompts()[0]])
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(gradient(False), gradient(True)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu(tokenizer):
    model, ids = make().cuda(), prompts()
    reference = [alone(make(), row, 20, [1]) for row in ids]
    assert [new for new, _ in answer_batch(model, tokenizer, ids, 20, [1])] == reference
    assert len(answer_batch(model.bfloat16(), tokenizer, ids * 100, 20, [1])) == 600


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_out_of_memory_for_real(tokenizer, capsys):
    model, ids = make().cuda(), ["<bos>" + "Tom has 3 apples. " * 30] * 4096
    torch.cuda.set_per_process_memory_fraction(2 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    try: found = list(generate(model, tokenizer, ids, 4, 4096, [1], progress=False))
    finally: torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(found) == 4096 and "out of GPU memory" in capsys.readouterr().out
