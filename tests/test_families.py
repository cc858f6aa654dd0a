"""Families of transformers as tiny random models: what is trained and answered in the end equals transformers' plain forward pass,
whichever path the checks chose. The references here know nothing of the checks"""
import json
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration, TrainerCallback
from families import FAMILIES, MODERN, MOE, tiny
from gsm8k_sft.core.config import load_config
from gsm8k_sft.core.runs import run_folder
from gsm8k_sft.data.datasets import Collator
from gsm8k_sft.data.synthetic import toy_model_path
from gsm8k_sft.evaluate import evaluate_base
from gsm8k_sft.generation import checks, engine
from gsm8k_sft.generation.batches import Request
from gsm8k_sft.generation.engine import engine_answers
from gsm8k_sft.generation.generate import generate, which_engine
from gsm8k_sft.generation.sampling import GenerationError, Sampling
from gsm8k_sft.models.loading import load_model
from gsm8k_sft.models.sources import ModelError
from gsm8k_sft.train import train
from gsm8k_sft.training.checks import packing_fault, two_examples
from gsm8k_sft.training.trainer import build_trainer

QUICK = "gemma2 gemma3_text llama phi gpt2 bloom nemotron granite gpt_oss lfm2 mamba".split()
PACKED = ("gemma gemma2 gemma3_text llama mistral qwen2 qwen3 phi3 gpt2-nodropout gpt_neox opt cohere cohere2 granite olmo2 olmo3 smollm3 "
          "exaone4 glm4 starcoder2 mixtral qwen2_moe").split() # slower paths would be right too, but nobody should take them unnoticed
SLOTS = [*PACKED, "phi", "gpt2", "gptj", "mixtral-aux"]
SETTINGS = ("train.packing=true train.per_device_train_batch_size=4 train.gradient_accumulation_steps=1 train.max_steps=1 "
            "train.eval_steps=0 train.validation_samples=0 train.max_grad_norm=1000000 train.optim=adamw_torch "
            "train.gradient_checkpointing=false train.report_to=none train.logging_steps=1 train.max_tokens=400")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    for name in ("runs", "eval_results", "cache"): monkeypatch.setenv(f"GSM8K_SFT_PATHS_{name.upper()}", str(tmp_path / name))
    monkeypatch.setattr(checks, "_KNOWN", {})


@pytest.fixture(scope="module")
def tokenizer(): return AutoTokenizer.from_pretrained(toy_model_path())


def examples(lengths=(45, 23, 31, 12)):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 700, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": ids, "labels": [-100] * 5 + ids[5:]} for ids in rows]


class Gradients(TrainerCallback):
    "What the optimizer gets in the first step"
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {n: p.grad.detach().float().cpu() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def without_dropout(model):
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout): m.p = 0.0
    return model


def plain_step(model, rows):
    "Loss and gradients of a padded batch in one forward pass of transformers"
    without_dropout(model).train()
    loss = model(**{k: v.to(model.device) for k, v in Collator(0)(rows).items()}).loss
    loss.backward()
    return loss.item(), {n: p.grad.detach().float().cpu() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def trained_step(model, rows, tokenizer, folder, **changes):
    "The same by the project's trainer, and whether it was packed"
    cfg = load_config("toy", overrides=[*SETTINGS.split(), *(f"{k.replace('__', '.')}={v}" for k, v in changes.items())])
    trainer, log, signals = build_trainer(cfg, folder, tokenizer, {}, {"train": Dataset.from_list(rows)}, model)
    without_dropout(model) # after the check has seen it
    trainer.add_callback(kept := Gradients())
    try: trainer.train()
    finally: signals.restore()
    assert trainer.fast_path["packing"] == "equal to transformers" or not trainer.cfg.train.packing
    return next(r["loss"] for r in log.rows if "loss" in r), kept.found, trainer.cfg.train.packing


def error(found, expected):
    "Relative difference of gradients"
    assert found.keys() == expected.keys()
    return float(sum((found[n] - g).square().sum() for n, g in expected.items()) / sum(g.square().sum() for g in expected.values())) ** 0.5


def families(*names): return [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in names]


@pytest.mark.parametrize("family", families(*FAMILIES))
def test_training_is_transformers(family, tokenizer, tmp_path):
    rows = examples()
    loss, gradients = plain_step(tiny(family), rows)
    its_loss, its_gradients, packed = trained_step(tiny(family), rows, tokenizer, tmp_path)
    assert its_loss == pytest.approx(loss, rel=1e-4) and error(its_gradients, gradients) < 1e-3
    assert packed or family not in PACKED


PROMPTS = ["<bos>Tom", "<bos>Tom has 3 apples and buys 4 more. How many apples does he have?", "<bos>3*8, 50-9", "<bos>" + "6+7, " * 9]


def answer(model, ids, n):
    "Greedy tokens, each from a forward pass of everything before it"
    new = []
    with torch.no_grad():
        while len(new) < n:
            row = torch.tensor([ids + new], device=model.device)
            new.append(model(input_ids=row, use_cache=False).logits[0, -1].argmax().item())
    return new


@pytest.mark.parametrize("family", families(*FAMILIES))
def test_answers_are_transformers(family, tokenizer):
    model = tiny(family)
    expected = [tokenizer.decode(answer(model, ids, 10), skip_special_tokens=True)
                for ids in tokenizer(PROMPTS, add_special_tokens=False)["input_ids"]]
    found = sorted(generate(model, tokenizer, PROMPTS, 10, 4, [], progress=False), key=lambda g: g.index)
    assert [g.text for g in found] == expected
    assert {g.n_tokens for g in found} == {10}
    choice = which_engine(model, "auto", tokenizer, tokenizer(PROMPTS)["input_ids"])
    assert choice.engine == "slots" or family not in SLOTS
    assert bool(choice.why) == (choice.engine == "transformers")


ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [3.0 + i for i in range(8)]}
LATE = {"phimoe": lambda n: dict(MOE, sliding_window=n, router_jitter_noise=0.0), # its window is in the mask alone
        "phi3": lambda n: dict(MODERN, original_max_position_embeddings=n, rope_parameters={**ROPE, "original_max_position_embeddings": n})}

@pytest.mark.parametrize("family", LATE)
def test_a_length_that_only_answers_reach(family, tokenizer, monkeypatch):
    "Prompts of 8 and 22 tokens, a model that changes at 40, and the verdict on shorter answers in the cache"
    monkeypatch.setitem(FAMILIES, family, LATE[family](40))
    model, prompts = tiny(family), ["<bos>Tom has 3 apples", PROMPTS[1]]
    token_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    assert which_engine(model, "auto", tokenizer, token_ids, 8).engine == "slots"
    found = sorted(generate(model, tokenizer, prompts, 60, 4, [], progress=False), key=lambda g: g.index)
    assert [g.text for g in found] == [tokenizer.decode(answer(model, ids, 60), skip_special_tokens=True) for ids in token_ids]


def test_a_length_that_few_examples_reach(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "phimoe", LATE["phimoe"](260))
    assert packing_fault(tiny("phimoe"), examples(), 0) == ""
    rows = examples((280, 20, 30, 12))
    loss, gradients = plain_step(tiny("phimoe"), rows)
    its_loss, its_gradients, packed = trained_step(tiny("phimoe"), rows, tokenizer, tmp_path)
    assert not packed and its_loss == pytest.approx(loss, rel=1e-4) and error(its_gradients, gradients) < 1e-3


def test_the_loss_of_routers_is_seen_in_half_precision(monkeypatch):
    "A thousandth of it, Mixtral's default, is less than rounding"
    monkeypatch.setitem(FAMILIES, "mixtral", dict(FAMILIES["mixtral-aux"], router_aux_loss_coef=0.001))
    assert "spread over experts" in packing_fault(tiny("mixtral"), examples(), 0, torch.bfloat16)


@pytest.mark.parametrize("lengths,taken", [((300, 40, 256, 30, 700), [30, 256]), ((900, 600), [600, 600]), ((12,), [12, 12])])
def test_the_check_takes_whole_texts(lengths, taken):
    rows = examples(lengths)
    found = two_examples(rows)
    assert [len(e["labels"]) for e in found] == taken
    assert all(e["input_ids"].tolist() in [r["input_ids"] for r in rows] for e in found)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gptj", "llama"])
def test_rows_are_planned_for_families_without_an_intermediate_size(family, monkeypatch):
    "What happens on a GPU alone, with 8 GB free"
    model = tiny(family)
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *a: (2**33, 2**33))
    rows, tokens = engine._plan_rows(model, 100, None)
    assert rows > 100 and tokens >= 100


def test_a_neighbour_that_leaks_is_found(monkeypatch):
    "By the numbers alone: LFM2, whose convolutions run on into the next example, as if the names of its layers said nothing"
    assert "kind conv" in packing_fault(tiny("lfm2"), examples(), 0)
    monkeypatch.setattr(checks, "_KNOWN", {})
    monkeypatch.setattr("gsm8k_sft.training.checks.foreign_parts", lambda model: "")
    for path in checks.project_path("cache", "checks").glob("*.json"): path.unlink()
    for half in (None, torch.bfloat16): assert "at one token" in packing_fault(tiny("lfm2"), examples(), 0, half)


def saved(family, tokenizer, folder):
    tiny(family).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_run_and_evaluation_record_the_path(tokenizer, tmp_path, capsys):
    "gpt-oss from a folder: trained padded, answered by transformers, and both records say why"
    folder = saved("gpt_oss", tokenizer, tmp_path / "gpt-oss")
    cfg = load_config("toy", overrides=[*SETTINGS.split(), f"model.path={folder}", "data.train_samples=8", "data.test_samples=2",
                                        "evaluation.max_new_tokens=4", "run_name=sinks", "train.max_steps=2"])
    train(cfg, evaluate=False)
    record = json.loads((run_folder(cfg) / "record.json").read_text())
    assert record["status"] == "complete" and "logits differ" in record["fast_path"]["packing"]
    assert "is trained on padded batches, not packed ones: logits differ" in capsys.readouterr().out
    [result] = evaluate_base(cfg, [0], progress=False)
    assert result["protocol"]["engine"] == "transformers" and "logits differ" in result["protocol"]["engine_why"]
    model = load_model(cfg)
    for settings, words in ((dict(engine="slots"), "can't be answered in slots"), (dict(sampling=Sampling()), "slots aren't possible")):
        with pytest.raises(GenerationError, match=f"{words}.*logits differ"):
            generate(model, tokenizer, PROMPTS, 4, 2, [1], progress=False, **settings)


def test_the_fast_path_is_recorded_and_leaves_the_run_as_it_was(tokenizer, tmp_path):
    "Trained with a check just done, and with a remembered one: the same steps, dropout included"
    def losses(name):
        cfg = load_config("toy", "lora", overrides=[*SETTINGS.split(), "data.train_samples=12", "data.test_samples=2", "train.max_steps=3",
                                                    "lora_config.lora_dropout=0.3", "train.learning_rate=1e-3", f"run_name={name}"])
        record = train(cfg, evaluate=False)
        assert record["fast_path"] == {"packing": "equal to transformers"}
        return [json.loads(l)["loss"] for l in (run_folder(cfg) / "log.jsonl").read_text().splitlines() if '"loss"' in l]
    first = losses("checked")
    assert len(first) == 3 and first == losses("remembered")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b'{"schema_version": 1}', b"\xff\xfe"])
def test_a_damaged_verdict_is_made_again(damage, monkeypatch):
    model, calls = tiny("gemma"), []
    def ask():
        monkeypatch.setattr(checks, "_KNOWN", {})
        return checks.remembered("packing", model, lambda: calls.append(1) or "it is odd")
    [ask(), ask()]
    [path] = checks.project_path("cache", "checks").glob("*.json")
    whole = json.loads(path.read_text())
    path.write_bytes(damage)
    assert ask() == ask() == "it is odd" and len(calls) == 2 and json.loads(path.read_text()) == whole


def test_a_verdict_belongs_to_configuration_and_dtype(monkeypatch):
    model, calls = tiny("gemma"), []
    def ask(): return checks.remembered("packing", model, lambda: calls.append(1) or "")
    ask(), ask()
    model.config.rms_norm_eps = 1e-3
    ask(), ask()
    model.bfloat16()
    ask(), ask()
    with torch.autocast("cpu", torch.bfloat16): ask(), ask()
    assert len(calls) == 4


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert packing_fault(tiny("gemma"), examples(), 0) == ""


def test_an_encoder_decoder_is_refused(tokenizer, tmp_path):
    small = T5Config(vocab_size=768, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    T5ForConditionalGeneration(small).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError) as e: load_model(load_config("toy", overrides=[f"model.path={tmp_path / 't5'}"], training=False))
    assert "T5" in str(e.value) and "\n" not in str(e.value)


def gpu_case(family, speedup, device, tokenizer, folder):
    "One step in mixed precision: relative errors of loss and gradients against transformers in fp32, and transformers' own in bf16"
    rows, half = examples((230, 120, 310, 64)), torch.bfloat16
    loss, exact = plain_step(tiny(family).to(device), rows)
    with torch.autocast(device, half): _, usual = plain_step(tiny(family).to(device), rows)
    its_loss, found, packed = trained_step(tiny(family).to(device), rows, tokenizer, folder, model__precision="mixed",
                                           train__speedup=speedup, train__max_tokens=1024)
    assert packed, "the check trusts it"
    errors = error(found, exact), error(usual, exact)
    assert its_loss == pytest.approx(loss, rel=1e-2) and errors[0] < max(1.5 * errors[1], 0.05), errors


@gpu
@pytest.mark.parametrize("family,speedup", [("gemma3_text", "compile"), ("gemma3_text", "record"), ("gemma2", "none"), ("llama", "record"),
                                            ("qwen2", "record"), ("opt", "none"), ("granite", "none"), ("cohere", "none"),
                                            ("gpt_neox", "none")])
def test_gpu_training(family, speedup, tokenizer, tmp_path): gpu_case(family, speedup, "cuda", tokenizer, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3_text", "opt"])
def test_gpu_case_on_the_cpu(family, tokenizer, tmp_path): gpu_case(family, "none", "cpu", tokenizer, tmp_path)


def answered_in_half(family, device, tokenizer):
    "Tokens of the project's answers that plain forward passes would not choose, and don't hold for tied"
    model, wrong = tiny(family).to(device, torch.bfloat16), 0
    ids = tokenizer(PROMPTS, add_special_tokens=False)["input_ids"]
    choice = which_engine(model, "auto", tokenizer, ids)
    assert choice.engine == "slots", choice.why
    for request, new, _ in engine_answers(model, [Request(i, row) for i, row in enumerate(ids)], 40, [], 4):
        row = torch.tensor([request.ids + new[:-1]], device=device)
        with torch.no_grad(): logits = model(input_ids=row).logits[0, len(request.ids) - 1:].float()
        most = logits.max(-1).values
        wrong += int((most - logits[torch.arange(len(new)), new] > 0.1 * (most - logits.mean(-1))).sum())
    return wrong


HALF = [f for f in SLOTS if f not in ("mixtral", "qwen2_moe", "mixtral-aux", "gptj")] # experts change at a rounding error

@gpu
@pytest.mark.parametrize("family", HALF)
def test_gpu_answers(family, tokenizer): assert answered_in_half(family, "cuda", tokenizer) == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3_text", "phi"])
def test_gpu_answers_on_the_cpu(family, tokenizer): assert answered_in_half(family, "cpu", tokenizer) == 0
