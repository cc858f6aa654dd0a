"A pretended Apple machine: tensors for `mps` are made on the CPU, and what MPS lacks raises as it does there"
import pytest, torch
from accelerate.state import AcceleratorState
from torch.overrides import TorchFunctionMode
from transformers.utils.import_utils import is_torch_mps_available
from gsm8k_sft.core.config import ConfigError, device, load_config
from gsm8k_sft.evaluate import evaluate_base
from gsm8k_sft.infer import open_model
from gsm8k_sft.models.loading import torch_dtype
from gsm8k_sft.train import train
from gsm8k_sft.training import trainer

SMALL = ("data.train_samples=16 data.test_samples=3 train.max_steps=2 train.warmup_steps=0 train.eval_steps=0 train.save_steps=1 "
         "train.learning_rate=1e-3 evaluation.max_new_tokens=6 evaluation.other_texts=0")


class Mps(TorchFunctionMode):
    "A tensor that is asked for on `mps` comes from the CPU, if it may be there; `made` counts them"
    made = 0
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.device, torch._C._nn._parse_to): return func(*args, **(kwargs or {}))
        def there(x): return isinstance(x, (str, torch.device)) and str(x).split(":")[0] == "mps"
        given = [*args, *(kwargs or {}).values()]
        found = func(*(torch.device("cpu") if there(x) else x for x in args),
                     **{k: torch.device("cpu") if there(x) else x for k, x in (kwargs or {}).items()})
        if torch.is_tensor(found) and any(map(there, given)):
            if found.dtype == torch.float64: raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
            assert found.dtype not in (torch.bfloat16, torch.float16), "all is in fp32 there"
            self.made += 1
        return found


def forget():
    "Libraries ask once for the devices that there are"
    AcceleratorState._reset_state(reset_partial_state=True)
    is_torch_mps_available.cache_clear()


@pytest.fixture
def apple(tmp_path, monkeypatch):
    if torch.cuda.is_available(): pytest.skip("a GPU is there")
    for key in ("RUNS", "EVAL_RESULTS"): monkeypatch.setenv(f"GSM8K_SFT_PATHS_{key}", str(tmp_path / key))
    for name in ("is_available", "is_built"): monkeypatch.setattr(torch.backends.mps, name, lambda: True)
    for name in ("manual_seed", "empty_cache", "set_rng_state"): monkeypatch.setattr(torch.mps, name, lambda *args: None)
    monkeypatch.setattr(torch.mps, "get_rng_state", torch.get_rng_state)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    forget()
    with Mps() as mode: yield mode
    monkeypatch.undo()
    forget()


def test_what_is_chosen_there(apple):
    cfg = load_config("gemma-3-270m", "lora", overrides="train.optim=adamw_torch_fused")
    assert (device(), cfg.model.precision, cfg.evaluation.dtype) == ("mps", "fp32", "fp32")
    assert {torch_dtype(d) for d in ("auto", "bf16", "fp32")} == {torch.float32} and torch_dtype("fp16") == torch.float16
    for wrong in (*(f"model.precision={p}" for p in ("mixed", "bf16", "fp16")), "train.optim=paged_adamw_8bit", "train.speedup=compile"):
        with pytest.raises(ConfigError, match=f"{wrong.split('=')[0]}: .* needs a CUDA GPU"): load_config("toy", overrides=wrong)
    with pytest.raises(ConfigError, match="qlora needs a CUDA GPU"): load_config("toy", "qlora")


def test_processes_beside_each_other_use_the_cpu(apple, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert device() == "cpu"


@pytest.mark.parametrize("tuning, packing", [("full", "true"), ("lora", "false")])
def test_the_toy_is_trained_and_asked_there(apple, monkeypatch, tuning, packing):
    "The same losses and answers as on the CPU"
    used, build = [], trainer.GSM8KTrainer.__init__
    def built(self, *args, **kwargs):
        build(self, *args, **kwargs)
        used.append((self.args.device.type, self.accelerator.device.type, self.accelerator.mixed_precision, self.compiled, self.speedup))
    monkeypatch.setattr(trainer.GSM8KTrainer, "__init__", built)
    cfg = load_config("toy", tuning, overrides=f"{SMALL} train.packing={packing}")
    record, before = train(cfg), apple.made
    assert record["status"] == "complete" and used == [("mps", "mps", "no", [], "none")] and before > 0
    assert record["fast_path"] == ({"packing": "equal to transformers"} if packing == "true" else {})
    result = evaluate_base(cfg, [0], progress=False)[0]
    assert apple.made > before and result["protocol"]["dtype"] == "float32" and result["protocol"]["engine"] == "slots"
    assert open_model("toy")[0].dtype == torch.float32
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    forget()
    again = train(load_config("toy", tuning, overrides=f"{SMALL} train.packing={packing} run_name=cpu"))
    assert (record["tuned_fingerprint"], record["final_loss"]) == (again["tuned_fingerprint"], again["final_loss"])
