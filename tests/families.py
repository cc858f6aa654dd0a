"Families of transformers as tiny random models, for the tests of the fast path and for its table in the docs"
import torch
from transformers import AutoConfig, AutoModelForCausalLM

WORDS = dict(vocab_size=768, pad_token_id=0, eos_token_id=1, bos_token_id=2)
MODERN = dict(WORDS, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
              max_position_embeddings=512)
GPT = dict(WORDS, resid_pdrop=0.0, embd_pdrop=0.0, n_embd=64, n_layer=2, n_head=4, n_positions=512)
OLD = dict(WORDS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512)
MOE = dict(MODERN, num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
WINDOW = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2)
LATENT = dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)

FAMILIES = { # model type -> its configuration; what stands behind a hyphen tells variants of a type apart
    "gemma": MODERN, "gemma2": dict(MODERN, **WINDOW, query_pre_attn_scalar=16, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    "gemma3_text": dict(MODERN, **WINDOW, query_pre_attn_scalar=16), "llama": MODERN, "mistral": dict(MODERN, sliding_window=16),
    "qwen2": MODERN, "qwen3": MODERN, "phi": OLD, "phi3": MODERN, "gpt2": GPT, "gpt2-nodropout": dict(GPT, attn_pdrop=0.0),
    "gpt_neox": dict(OLD, intermediate_size=96),
    "gpt_neo": dict(OLD, attention_types=[[["global", "local"], 1]], num_layers=2, window_size=16),
    "gptj": dict(GPT, rotary_dim=8), "opt": dict(OLD, ffn_dim=96, word_embed_proj_dim=64, dropout=0.0),
    "bloom": dict(OLD, n_layer=2, n_head=4),
    "falcon": OLD, "falcon-alibi": dict(OLD, alibi=True), "mpt": dict(WORDS, d_model=64, n_heads=4, n_layers=2, max_seq_len=512),
    "stablelm": MODERN, "cohere": dict(MODERN, logit_scale=0.25), "cohere2": dict(MODERN, **WINDOW, logit_scale=0.25),
    "granite": dict(MODERN, logits_scaling=4.0, attention_multiplier=0.1, embedding_multiplier=3.0, residual_multiplier=0.5),
    "olmo2": MODERN, "olmo3": dict(MODERN, **WINDOW), "smollm3": MODERN, "exaone4": dict(MODERN, **WINDOW), "glm4": MODERN,
    "nemotron": MODERN, "starcoder2": dict(MODERN, residual_dropout=0.0, embedding_dropout=0.0),
    "gpt_bigcode": dict(GPT, attn_pdrop=0.0), "mixtral": MOE,
    "mixtral-aux": dict(MOE, output_router_logits=True, router_aux_loss_coef=0.5),
    "qwen2_moe": dict(MOE, shared_expert_intermediate_size=32),
    "gpt_oss": dict(MOE, **WINDOW), "llama4_text": dict(MOE, attention_chunk_size=16, intermediate_size_mlp=64),
    "deepseek_v3": dict(MODERN, **LATENT, head_dim=8, num_key_value_heads=4, n_routed_experts=4, n_group=1, topk_group=1,
                        num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1),
    "lfm2": dict(MODERN, layer_types=["conv", "full_attention"] * 2), "mamba": dict(MODERN, state_size=8),
    "mamba2": dict(MODERN, state_size=8, num_heads=8, n_groups=2),
    "recurrent_gemma": dict(MODERN, lru_width=64, attention_window_size=16),
    "jamba": dict(MOE, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False),
    "qwen3_next": dict(MOE, **LINEAR, layer_types=["linear_attention", "full_attention"] * 2),
    "rwkv": dict(MODERN, attention_hidden_size=64),
    "bart": dict(WORDS, d_model=64, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=96, dropout=0.0, scale_embedding=True),
}


def tiny(family):
    "A random model of a family in fp32: with large weights, so that answers wander, and with biases and sinks that aren't zero"
    torch.manual_seed(1)
    config = AutoConfig.for_model(family.partition("-")[0], **FAMILIES[family])
    capped = getattr(config, "attn_logit_softcapping", None) # transformers before 5.24 would take sdpa, which doesn't cap
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if capped else None).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "norm" not in name: p.mul_(4)
            elif "bias" in name or "sinks" in name: p.normal_()
    return model
