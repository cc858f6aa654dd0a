"Parameters and weights of each method, counted on shapes: a reference for the plan and for what is loaded"
import pandas as pd
import torch

from gsm8k_sft.models.adapters import add_adapter
from gsm8k_sft.models.parameters import count_parameters, meta_model


def _table_row(cfg, tuning, targets):
    "One method's row; the model is built on the meta device"
    cfg, model, packed = cfg.copy(), meta_model(cfg), 0
    if tuning != "full":
        cfg.lora_config.target_modules = targets
        with torch.device("meta"): model = add_adapter(model, cfg)
    if tuning == "qlora": packed = sum(m.weight.numel() for n, m in model.named_modules() if n.endswith("base_layer"))
    counts, precision = count_parameters(model), cfg.model.precision
    adapter = 0 if tuning == "full" else counts["trainable"]
    size = {"fp32": 4, "fp16": 4, "bf16": 2, "mixed": 4 if tuning == "full" else 2}[precision] # bytes of a base weight
    bits = 4 + (8 / 64 + 32 / (64 * 256) if cfg.qlora_config.double_quant else 32 / 64)
    held = (counts["total"] - adapter - packed) * size + packed * bits / 8 + adapter * (2 if precision == "bf16" else 4)
    return {"model": cfg.model.name, "method": tuning, "r": cfg.lora_config.r if adapter else None,
            "targets": targets if isinstance(targets, str) else " ".join(targets), **counts,
            "trainable %": 100 * counts["trainable"] / counts["total"], "weights MiB": int(held) / 2**20}


def parameter_table(
    cfg, # configuration from `load_config`: model, precision and lora_config
    targets: tuple = ("all-linear", ["q_proj", "v_proj"]), # choices of target_modules for LoRA; the first also for QLoRA
): # DataFrame, a row a method: total and trainable parameters, the share in %, the weights' memory in MiB
    "Parameters of each method, from shapes alone"
    methods = [("full", "")] + [("lora", t) for t in targets] + [("qlora", targets[0])]
    return pd.DataFrame([_table_row(cfg, *m) for m in methods]).astype({"r": "Int64"})
