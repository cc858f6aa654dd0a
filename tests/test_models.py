"Loading from every source and every way it fails; precision, LoRA, QLoRA, merging, fingerprints, tuned runs"
import hashlib, importlib.util, json, os, re, shutil, signal, string, subprocess, sys, textwrap, threading, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
import pytest, torch
from parameters import parameter_table
from transformers import set_seed
from gsm8k_sft.core.config import ConfigError, _choose_precision, gpu_has_bf16, load_config, project_path
from gsm8k_sft.core.runs import read_json, run_folder as folder_of, save_config, write_json
from gsm8k_sft.data.prompts import Renderer, special_tokens
from gsm8k_sft.generation.generate import generate, stop_tokens
from gsm8k_sft.generation.kv_cache import plain_prefill
from gsm8k_sft.models import sources
from gsm8k_sft.models.adapters import add_adapter, linear_layers, load_tuned, merge_adapter, prepare_for_training
from gsm8k_sft.models.loading import DTYPES, adapter_folder, load_adapter, load_model, load_tokenizer, load_weights, weight_dtype
from gsm8k_sft.models.parameters import count_parameters, meta_model, precision_of
from gsm8k_sft.models.sources import (
    GEMMA_PACKAGE, ModelError, check_folder, check_merges, convert_gguf, download_model, error_text, prepare_gemma,
    resolve_model, weights_fingerprint)
from gsm8k_sft.reporting.logs import read_log
from gsm8k_sft.train import train
from gsm8k_sft.training.checkpoints import TrainingError
from gsm8k_sft.training.graphs import choose_speedup
from gsm8k_sft.training.loss import linear_cross_entropy
from gsm8k_sft.training.packing import Packed
from gsm8k_sft.training.trainer import build_trainer, training_arguments

HAS_GEMMA = all(importlib.util.find_spec(m) for m in (GEMMA_PACKAGE, "gguf"))
HAS_BNB = importlib.util.find_spec("bitsandbytes") is not None


@pytest.fixture(scope="module")
def toy(): return resolve_model("toy")

@pytest.fixture(scope="module")
def ids(): return load_tokenizer("toy")(["Tom has 12 apples and 30 pears. 12 + 30 = 42"], return_tensors="pt").input_ids

@pytest.fixture
def folder(toy, tmp_path): return Path(shutil.copytree(toy, tmp_path / "model"))

def config(tuning="lora", overrides="", **kwargs): return load_config("toy", tuning, overrides=overrides, training=False, **kwargs)

def model_size(model): return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))

def logits(model, ids):
    with torch.no_grad(): return model.eval()(input_ids=ids).logits.float()

def filled(model, std=0.02):
    "Give a new adapter's B a value, as training would"
    torch.manual_seed(1)
    for n, p in model.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p, std=std)
    return model.eval()


# Folders

def test_preset_name_folder_and_path_lead_to_the_same_weights(toy):
    assert resolve_model("toy") == resolve_model(config().model) == resolve_model(str(toy)) == toy
    moved = load_config("gemma-2b-it", training=False, overrides=f"model.path={toy}")
    assert resolve_model(moved.model) == toy.resolve()

@pytest.mark.parametrize("gone, says", [
    ("config.json", "no config.json"),
    ("model.safetensors", "no *.safetensors"),
    ("tokenizer.json", "no tokenizer")])
def test_incomplete_folder(folder, gone, says):
    (folder / gone).unlink()
    with pytest.raises(ModelError, match=f"{folder.name}: {says}".replace("*", r"\*")): resolve_model(str(folder))

def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only pickled weights \\(pytorch_model.bin\\).*save_pretrained"): resolve_model(str(folder))

def test_missing_shard(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}}))
    with pytest.raises(ModelError, match="1 of 2 weight files are missing \\(model-1.safetensors"): resolve_model(str(folder))

def test_weights_and_an_adapter_in_one_folder(folder, hub):
    "transformers would put the adapter on weights that may already have it"
    add_adapter(load_weights(folder, "fp32"), config()).save_pretrained(folder)
    for refused in (lambda: resolve_model(str(folder)), lambda: load_tokenizer(str(folder)), lambda: weights_fingerprint(folder)):
        with pytest.raises(ModelError, match="holds weights and an adapter"): refused()
    hub.folder = folder
    with pytest.raises(ModelError, match="holds weights and an adapter"): check_folder(download_model("org/model", endpoint=hub.address))

def test_adapter_folder_is_no_model(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(ModelError, match="it holds an adapter"): resolve_model(str(folder))

@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "~/nowhere-at-all"])
def test_no_such_folder(name):
    with pytest.raises(ModelError, match="no such model folder"): resolve_model(name)

def test_truncated_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="can't be loaded"): load_weights(folder, "fp32")

def test_wrong_shapes(folder):
    c = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(c | {"intermediate_size": c["intermediate_size"] * 2}))
    with pytest.raises(ModelError): load_weights(folder, "fp32")

def test_every_tensor_of_a_file_is_on_the_model(folder):
    c = json.loads((folder / "config.json").read_text())
    fewer = {"num_hidden_layers": 5, "layer_types": c["layer_types"][:5]}
    (folder / "config.json").write_text(json.dumps(c | fewer))
    with pytest.raises(ModelError, match=r"13 tensors of its files are not in the model: model\.layers\.5\."): load_weights(folder, "fp32")

def test_errors_are_not_cut_off_at_a_colon(folder):
    assert error_text(ValueError("Error(s) in loading:\n\tsize mismatch\n\n for x")) == "Error(s) in loading: size mismatch for x"
    assert error_text(ValueError("\n".join("abcdef"))) == "a b c d and 2 more lines" and error_text(KeyError()) == "KeyError"
    c = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(c | {"intermediate_size": c["intermediate_size"] * 2}))
    with pytest.raises(ModelError) as e: load_weights(folder, "fp32")
    assert not str(e.value).rstrip(")").endswith(":")

def test_unreadable_config_and_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="its tokenizer can't be loaded"): load_tokenizer(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="can't be loaded"): load_weights(folder, "fp32")

def test_remote_code_is_never_run(folder):
    (folder / "code.py").write_text("raise SystemExit('remote code ran')")
    c = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(c | own))
    with pytest.raises(ModelError, match="code of its own, which gsm8k_sft never runs"): load_weights(folder, "fp32")

def test_tokenizer_without_pad_token(folder):
    t = load_tokenizer(str(folder))
    t.pad_token = None
    t.save_pretrained(folder)
    again = load_tokenizer(str(folder))
    assert again.pad_token == t.eos_token
    t.eos_token = None
    t.save_pretrained(folder)
    assert load_tokenizer(str(folder)).pad_token_id is not None

def test_a_saved_tokenizer_writes_the_date_that_was_trained(folder):
    from transformers import AutoTokenizer
    t, asked = load_tokenizer(str(folder)), [{"role": "user", "content": "Why?"}]
    t.chat_template = "{{ strftime_now('%H:%M:%S.%f') }}" + t.chat_template
    t.save_pretrained(folder)
    for _ in range(2): load_tokenizer(str(folder)).save_pretrained(folder)
    found = AutoTokenizer.from_pretrained(folder).apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert found == Renderer(load_tokenizer(str(folder))).prompt("Why?") and found.startswith("26 Jul 2024<")


# Folders that people have: each as transformers loads it, or one sentence

def edited(file, **values): file.write_text(json.dumps(json.loads(file.read_text()) | values))

def sharded_snapshot(folder):
    "As the hub's cache lays it out: shards, and only links to them"
    model, tokenizer, blobs = load_weights(folder, "fp32"), load_tokenizer(str(folder)), folder.parent / "cache" / "blobs"
    snapshot, made = blobs.parent / "snapshots" / "0123abc", folder.parent / "made"
    model.save_pretrained(made, max_shard_size="2MB")
    tokenizer.save_pretrained(made)
    for path in (blobs, snapshot): path.mkdir(parents=True)
    for i, file in enumerate(made.iterdir()):
        file.rename(blobs / f"blob{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{i}")
    assert len([*snapshot.glob("model-*.safetensors")]) > 1
    return snapshot

def untied_but_called_tied(folder):
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding + torch.randn_like(embedding) / 50}, folder / "model.safetensors", {"format": "pt"})

def pad_beyond_the_embedding(folder):
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= 768
    tokenizer.save_pretrained(folder)

def more_tokens_than_rows(folder):
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["<new>", "<newer>"])
    tokenizer.save_pretrained(folder)

def only_vocabulary_and_merges(folder):
    "GPT-2 with the files of a slow tokenizer"
    from transformers import GPT2Config, GPT2LMHeadModel
    shutil.rmtree(folder)
    words = ["<|endoftext|>", *string.ascii_letters, *string.digits, *string.punctuation, "Ġ", "Ċ", "th", "the", "Ġt"]
    torch.manual_seed(0)
    shape = dict(n_positions=2048, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(words), **shape)).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ t\n")
    tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **tokens}))

def beside(folder):
    "Other formats of the same weights, and what a training left"
    for name in ("pytorch_model.bin", "model.gguf", "optimizer.pt", "training_args.bin"): (folder / name).write_bytes(b"none of ours")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")

def renamed(name):
    def rename(folder): return folder.rename(folder.parent / name)
    return rename

GENERATION = "generation_config.json"
SIZES = dict(vocab_size=768, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512)

FOLDERS = {
    "shards that are links": sharded_snapshot,
    "a head of its own that is called tied": untied_but_called_tied,
    "a tokenizer without a padding token": lambda f: edited(f / "tokenizer_config.json", pad_token=None),
    "a tokenizer without padding and end": lambda f: edited(f / "tokenizer_config.json", pad_token=None, eos_token=None),
    "a padding token without a row": pad_beyond_the_embedding,
    "more tokens than rows": more_tokens_than_rows,
    "a slow tokenizer": only_vocabulary_and_merges,
    "other formats beside": beside,
    "sampling switched on": lambda f: edited(f / GENERATION, do_sample=True, temperature=0.7, top_k=5, num_beams=3, max_length=20),
    "sampling left over": lambda f: edited(f / GENERATION, do_sample=False, temperature=0.6, top_p=0.9),
    "another token ends answers": lambda f: edited(f / GENERATION, eos_token_id=[3, 1], pad_token_id=99999),
    "no token ends answers": lambda f: edited(f / GENERATION, eos_token_id=[]),
    "a damaged generation_config": lambda f: (f / GENERATION).write_text("{") and None,
    "a leading dash, spaces, quotes": renamed("-a 'model' $(of) mine"),
    "no ASCII": renamed("модель ☃ mañana"),
    "a name that ends as a GGUF file's": renamed("model.gguf"),
}

TRAINED = [k for k in FOLDERS if k.startswith(("a head", "a padding", "more", "a slow", "sampling", "a leading"))] # where saving could fail

@pytest.mark.parametrize("kind", FOLDERS)
def test_odd_folders_load_as_transformers_loads_them(folder, kind, own_runs):
    "Logits and greedy answers of transformers itself; some are trained, and loaded again"
    from transformers import AutoModelForCausalLM, AutoTokenizer
    found = FOLDERS[kind](folder)
    folder = found if isinstance(found, Path) else folder
    model, tokenizer = load_weights(resolve_model(str(folder)), "fp32"), load_tokenizer(str(folder))
    plain, own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)
    text = "<bos>Tom has 12 apples and the others. How many has he?"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert ids.tolist() == own(text, add_special_tokens=False, return_tensors="pt").input_ids.tolist()
    torch.testing.assert_close(logits(model, ids), logits(plain, ids), rtol=0, atol=0)
    stops = [plain.generation_config.eos_token_id]
    stops = [i for i in (stops[0] if isinstance(stops[0], list) else stops) if i is not None]
    if tokenizer.eos_token or tokenizer.chat_template:
        renderer = Renderer(tokenizer)
        assert set(renderer.stop_ids) <= set(ours := stop_tokens(model, renderer))
        assert all(i in ours for i in stops if i in special_tokens(tokenizer).values())
        prompts = [renderer.prompt(q) for q in ("How many are 3 and 4?", "Tom has 12 apples and eats 3. How many has he?")]
        for engine in ("auto", "transformers"):
            for answer in generate(model, tokenizer, prompts, 12, 2, ours, progress=False, engine=engine):
                asked = tokenizer(prompts[answer.index], add_special_tokens=False, return_tensors="pt")
                greedy = dict(max_new_tokens=12, do_sample=False, num_beams=1, top_k=None, temperature=1.0, eos_token_id=ours)
                expected = plain.generate(**asked, **greedy)
                new = expected[0, asked.input_ids.shape[1]:]
                assert answer.text == tokenizer.decode(new[:-1] if new[-1] in ours else new, skip_special_tokens=True), engine
    if kind not in TRAINED: return
    more = ["train.max_steps=1", "train.warmup_steps=0", "train.eval_steps=0", "train.learning_rate=1e-3", "train.packing=false",
            "data.train_samples=8", "data.max_length=2000"]
    cfg = load_config("toy", "lora", overrides=[f"model.path={json.dumps(str(folder), ensure_ascii=False)}", *more])
    train(cfg, evaluate=False)
    tuned, _ = load_tuned(folder_of(cfg), "fp32")
    assert not torch.equal(logits(tuned, ids), logits(model, ids))

@pytest.mark.skipif(not HAS_BNB, reason="needs bitsandbytes")
def test_a_folder_of_four_bit_weights_is_read_as_transformers_reads_it(folder, ids, own_runs):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=four).save_pretrained(folder)
    plain, model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_weights(folder, "fp32")
    assert model.is_loaded_in_4bit
    torch.testing.assert_close(logits(model, ids), logits(plain, ids), rtol=0, atol=0)
    cfg = config("lora", f"model.path={folder}")
    with pytest.raises(ModelError, match="tuning_method: lora on 4-bit weights: use tuning=qlora"): prepare_for_training(model, cfg)

def test_examples_longer_than_the_model_are_refused(folder, own_runs):
    edited(folder / "config.json", max_position_embeddings=40)
    with pytest.raises(TrainingError, match="the model 40 positions; set data.max_length=40"):
        train(load_config("toy", overrides=[f"model.path={folder}", "data.train_samples=8"]), evaluate=False)

def only(*names):
    def leave(folder):
        (folder / "model.safetensors").unlink()
        for name in names: (folder / name).write_bytes(b"x")
    return leave

def cache_itself(folder): return sharded_snapshot(folder).parents[1]
def a_broken_link(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../blobs/gone")
def only_pieces(folder): (folder / "tokenizer.json").rename(folder / "tokenizer.model")
def no_merges(folder):
    only_vocabulary_and_merges(folder)
    (folder / "merges.txt").unlink()

def index(value): return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value})) and None

def an_encoder(folder, **sizes):
    from transformers import RobertaConfig, RobertaForCausalLM
    RobertaForCausalLM(RobertaConfig(**{**SIZES, **sizes})).save_pretrained(folder)

REFUSED = {
    "an optimizer alone": (only("optimizer.bin", "training_args.bin"), r"no \*.safetensors"),
    "GGUF alone": (only("a.gguf"), "a.gguf: name that file itself"),
    "a variant of the weights": (only("model.fp16.safetensors"), "no file named model.safetensors"),
    "a broken link": (a_broken_link, "model.safetensors"),
    "a model's cache": (cache_itself, "name one of the folders in its snapshots"),
    "tied, and called untied": (lambda f: edited(f / "config.json", tie_word_embeddings=False), "not in its files: lm_head.weight"),
    "generation settings that transformers refuses": (lambda f: edited(f / GENERATION, num_return_sequences=4), "num_return_sequences"),
    "a vocabulary without merges": (no_merges, "its tokenizer can't be loaded.*merges"),
    "SentencePiece without its library": (only_pieces, "install sentencepiece"),
    "an index that names no files": (index(None), "no JSON object with the key"),
    "an index with a number for a file": (index({"a": 1}), "weight files are missing"),
    "an encoder": (an_encoder, "RobertaForCausalLM reads ahead as an encoder"),
    "an encoder of three tokens": (lambda f: an_encoder(f, vocab_size=3), "reads ahead as an encoder"),
}

@pytest.mark.parametrize("kind", REFUSED)
def test_other_odd_folders_are_refused_in_one_sentence(folder, kind):
    if "library" in kind and importlib.util.find_spec("sentencepiece"): pytest.skip("sentencepiece is there")
    change, says = REFUSED[kind]
    found = change(folder)
    folder = found if isinstance(found, Path) else folder
    with pytest.raises(ModelError, match=says) as e: load_weights(resolve_model(str(folder)), "fp32"), load_tokenizer(str(folder))
    assert folder.name in str(e.value) and "\n" not in str(e.value)


# Attention

def test_attention_is_passed_through(toy):
    assert load_weights(toy, "fp32", "eager").config._attn_implementation == "eager"
    assert load_model(config(overrides="model.attn_implementation=eager")).config._attn_implementation == "eager"

def test_gemma2_has_no_sdpa(tmp_path, folder):
    from transformers import Gemma2Config, Gemma2ForCausalLM
    Gemma2ForCausalLM(Gemma2Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                   num_key_value_heads=1, head_dim=16)).save_pretrained(tmp_path / "g2")
    with pytest.raises(ModelError, match="model.attn_implementation: 'sdpa' is not possible"): load_weights(tmp_path / "g2", "fp32", "sdpa")
    assert load_weights(tmp_path / "g2", "fp32").config._attn_implementation == "eager"


# The hub, played by a server on this machine

class Hub(BaseHTTPRequestHandler):
    "Enough of the hub's protocol to fetch one repository, or to refuse"
    folder, refusal, asked = None, None, []
    sha = "0123456789abcdef0123456789abcdef01234567"
    def log_message(self, *args): pass
    def send(self, code, body=b"", head=False, **headers):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        for k, v in headers.items(): self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        if not head: self.wfile.write(body)
    def send_json(self, value): self.send(200, json.dumps(value).encode(), Content_Type="application/json")
    def entry(self, path):
        return {"type": "file", "path": str(path.relative_to(self.folder)), "size": path.stat().st_size, "oid": self.oid(path)}
    def do_HEAD(self): self.do_GET(head=True)
    def do_GET(self, head=False):
        if self.refusal: return self.send(self.refusal[0], X_Error_Code=self.refusal[1], head=head)
        path = self.path.split("?")[0]
        if "/tree/" in path: return self.send_json([self.entry(p) for p in self.folder.rglob("*") if p.is_file()])
        if path.startswith("/api/"): return self.send_json({"id": "org/model", "sha": self.sha, "siblings": []})
        file = self.folder / path.split(f"/{self.sha}/")[-1]
        self.asked.append(file.name)
        self.send(200, file.read_bytes(), head, ETag=f'"{self.oid(file)}"', X_Repo_Commit=self.sha)
    @staticmethod
    def oid(path): return hashlib.sha1(path.read_bytes()).hexdigest()

@pytest.fixture
def hub(monkeypatch, tmp_path):
    import huggingface_hub.constants as constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    handler = type("H", (Hub,), {"asked": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.address = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()

@pytest.mark.parametrize("refusal, says", [
    ((403, "GatedRepo"), "gated.*licence at https://huggingface.co/google/gemma-2b-it.*hf auth login.*preset=gemma-3-270m.*preset=toy"),
    ((401, "GatedRepo"), "gated.*hf auth login"),
    ((404, "RepoNotFound"), "check the spelling"),
    ((401, "RepoNotFound"), "private or gated and you are not logged in"),
    ((404, "RevisionNotFound"), "no revision 'v9'; see model.revision")])
def test_hub_refusals_say_what_to_do(hub, refusal, says):
    hub.refusal = refusal
    start = time.time()
    with pytest.raises(ModelError, match=says): download_model("google/gemma-2b-it", "v9", hub.address)
    assert time.time() - start < 10

def test_no_network_is_noticed_at_once(hub):
    start = time.time()
    with pytest.raises(ModelError, match="not in the local hub cache, and the hub can't be reached.*preset=toy"):
        download_model("google/gemma-2b-it", endpoint="http://127.0.0.1:9")
    assert time.time() - start < 5

def test_hub_download_takes_safetensors_only_and_is_found_offline(hub, folder):
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"other")
    hub.folder = folder
    got = download_model("org/model", endpoint=hub.address)
    assert got.name == hub.sha and not {"pytorch_model.bin"} & set(hub.asked) and not (got / "original").exists()
    assert weights_fingerprint(got) == weights_fingerprint(folder)
    assert download_model("org/model", endpoint="http://127.0.0.1:9") == got


# GGUF and the packages

PACKAGE = """
from pathlib import Path
MODEL_NAME = 'g.gguf'
def assemble(path, overwrite=False):
    Path(path).write_bytes({content!r})
    return path
"""

def fake_package(tmp_path, monkeypatch, content=b"GGUF....", digest=None):
    "A package with the real one's interface, in a folder on the path and without metadata"
    root = tmp_path / "site" / GEMMA_PACKAGE
    (root / "data").mkdir(parents=True)
    (root / "__init__.py").write_text(PACKAGE.format(content=content))
    (root / "data" / "SHA256SUMS").write_text(f"{digest or hashlib.sha256(content).hexdigest()}  g.gguf\n")
    for name in ("NOTICE.md", "GEMMA_TERMS.html"): (root / "data" / name).write_text(name)
    monkeypatch.syspath_prepend(root.parent)
    monkeypatch.delitem(sys.modules, GEMMA_PACKAGE, raising=False)

def test_package_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, GEMMA_PACKAGE, None)
    with pytest.raises(ModelError, match=r"isn't installed: pip install"): prepare_gemma(tmp_path / "gemma")
    assert [p.name for p in tmp_path.iterdir()] == ["gemma.lock"]

def test_wrong_checksum(tmp_path, monkeypatch):
    fake_package(tmp_path, monkeypatch, digest="0" * 64)
    with pytest.raises(ModelError, match="not the file that SHA256SUMS names"): prepare_gemma(tmp_path / "gemma")
    assert not (tmp_path / "gemma").exists() and not list(tmp_path.glob(".gemma*"))

def test_unpacked_package_is_converted_once(tmp_path, monkeypatch, toy):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    fake_package(tmp_path, monkeypatch)
    read = []
    def from_toy(path, part):
        read.append(path)
        AutoTokenizer.from_pretrained(toy).save_pretrained(part)
        return AutoModelForCausalLM.from_pretrained(toy, dtype=torch.bfloat16)
    monkeypatch.setattr(sources, "_read_gguf", from_toy)
    for _ in range(2): made = prepare_gemma(tmp_path / "gemma")
    assert len(read) == 1 and weights_fingerprint(made) == weights_fingerprint(toy)
    assert read_json(made / "record.json")["source"]["sha256"] == hashlib.sha256(b"GGUF....").hexdigest()
    assert {"NOTICE.md", "GEMMA_TERMS.html", "model.safetensors"} < {p.name for p in made.iterdir()} and not list(made.glob("*.gguf"))

def test_broken_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("GSM8K_SFT_PATHS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(ModelError, match="m.gguf"): convert_gguf(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"PK\3\4")
    with pytest.raises(ModelError, match="not a GGUF file"): resolve_model(str(tmp_path / "m.gguf"))

def test_a_tokenizer_without_merges_is_refused_before_the_weights_are_read(tmp_path, monkeypatch):
    import transformers
    check_merges(load_tokenizer("toy"), "toy")
    class Pieces:
        def get_vocab(self): return {"▁many": 1}
        def tokenize(self, text): return ["▁m", "any"]
        def save_pretrained(self, folder): pass
    def weights(*args, **kwargs): raise AssertionError("the weights were read first")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: Pieces())
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", weights)
    monkeypatch.setenv("GSM8K_SFT_PATHS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(ModelError, match=r"'many' becomes ▁m \+ any.*transformers 5\.23 or later"): convert_gguf(tmp_path / "m.gguf")

MAKE = """
    import sys, time
    from pathlib import Path
    from gsm8k_sft.core.runs import write_json
    from gsm8k_sft.models.sources import _once
    def make(part):
        (part / "weights").write_text("half")
        Path(sys.argv[1] + "-begun").open("a").write("x")
        time.sleep(float(sys.argv[2]))
        write_json(part / "record.json", {})
    _once(Path(sys.argv[1]), make)
"""

def start_make(folder, seconds):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(MAKE), str(folder), str(seconds)])

def test_two_processes_convert_once(tmp_path):
    both = [start_make(tmp_path / "m", 1) for _ in range(2)]
    assert [p.wait(60) for p in both] == [0, 0]
    assert (tmp_path / "m-begun").read_text() == "x"

def test_killed_conversion_leaves_nothing_that_looks_whole(tmp_path):
    first = start_make(tmp_path / "m", 60)
    while not (tmp_path / "m-begun").exists(): time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "m").exists()
    assert start_make(tmp_path / "m", 0).wait(60) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m-begun", "m.lock"]

@pytest.mark.skipif(not HAS_GEMMA, reason="the extra gemma-3-270m is not installed")
def test_real_gemma(tmp_path):
    made = prepare_gemma(project_path("cache", "models", "gemma-3-270m"))
    model, tokenizer = load_weights(made, "fp32"), load_tokenizer(str(made))
    assert count_parameters(model)["total"] == count_parameters(meta_model(load_config("gemma-3-270m", training=False)))["total"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer("The capital of France is Paris. The capital of Italy is", return_tensors="pt").input_ids
    assert ids[0, 0] == 2 and "Rome" in tokenizer.decode(logits(model, ids)[0, -1].argmax())
    turn = tokenizer("<start_of_turn>user\n3 + 4<end_of_turn>", add_special_tokens=False).input_ids
    assert (turn[0], turn[-1]) == (105, 106)


LEFT = """
import atexit, torch, threading
from concurrent.futures import ThreadPoolExecutor
from gsm8k_sft.models.sources import weights_fingerprint
begun, first = [], threading.Event()
class Weight:
    def detach(self):
        begun.append(self), first.set()
        return torch.zeros(8_000_000)
class Model:
    def state_dict(self, keep_vars): return {f"w{i}": Weight() for i in range(200)}
atexit.register(lambda: print(len(begun)))
ThreadPoolExecutor(1).submit(weights_fingerprint, Model())
first.wait(60)
raise SystemExit("a reason")
"""


def test_a_process_that_ends_does_not_wait_for_a_fingerprint():
    "Weights are hashed beside other work, which may fail; Python would wait for all of them"
    ended = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and ended.stderr == "a reason\n" and 0 < int(ended.stdout) < 100


# Precision

PRECISIONS = [
    ("full", "mixed", {"float32"}, {"float32"}),
    ("full", "bf16", {"bfloat16"}, {"bfloat16"}),
    ("full", "fp32", {"float32"}, {"float32"}),
    ("full", "fp16", {"float32"}, {"float32"}),
    ("lora", "mixed", {"bfloat16"}, {"float32"}),
    ("lora", "bf16", {"bfloat16"}, {"bfloat16"}),
    ("lora", "fp32", {"float32"}, {"float32"}),
    ("lora", "fp16", {"float32"}, {"float32"}),
]

@pytest.mark.parametrize("tuning, precision, frozen, trainable", PRECISIONS)
def test_precision_is_what_it_says(tuning, precision, frozen, trainable):
    cfg = config(tuning, f"model.precision={precision}")
    found = precision_of(prepare_for_training(load_model(cfg, training=True), cfg))
    assert {d for d, n in found.items() if n["trainable"]} == trainable
    assert {d for d, n in found.items() if n["frozen"]} == (frozen if tuning == "lora" else set())

@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_evaluation_has_its_own_precision(dtype):
    assert set(precision_of(load_model(config(overrides=f"evaluation.dtype={dtype}")))) == {DTYPES[dtype]}

@pytest.mark.parametrize("bf16, training, precision, dtype", [
    (True, True, "mixed", "bf16"), (False, True, "fp16", "fp32"), (None, True, "fp32", "bf16"), (None, False, "mixed", "bf16")])
def test_auto_is_what_the_gpu_can(bf16, training, precision, dtype):
    "An H100, a T4, a machine without a GPU, and a plan made there"
    cfg = load_config("gemma-3-270m", training=False, bf16=True)
    cfg.model.precision = cfg.evaluation.dtype = "auto"
    _choose_precision(cfg, bf16, training)
    assert (cfg.model.precision, cfg.evaluation.dtype) == (precision, dtype)

def test_a_gpu_without_bf16_is_asked_for_none():
    "Weights, autocast, attention, speed-ups, 4-bit products and the loss of a run on a pretended T4"
    for tuning in ("full", "lora", "qlora"):
        cfg = load_config("gemma-3-270m", tuning, training=False, bf16=False)
        args = training_arguments(cfg, "unused")
        assert (args.fp16, args.bf16, weight_dtype(cfg, True), weight_dtype(cfg, False)) == (True, False, "fp32", "fp32")
        assert choose_speedup(cfg, 10**8, gpu=True) == "none"
    quantized = load_model(config("qlora", "model.precision=fp16"), training=True)
    assert quantized.config.quantization_config.bnb_4bit_compute_dtype == torch.float16
    with pytest.raises(ConfigError, match="scaled loss.*train.speedup=compile"):
        choose_speedup(load_config("gemma-3-270m", training=False, bf16=False, overrides="train.speedup=record"), 10**8, gpu=True)

@pytest.mark.parametrize("precision", ["mixed", "bf16"])
def test_bf16_on_a_gpu_without_it_is_refused(precision):
    with pytest.raises(ConfigError, match=f"model.precision: {precision} .*use model.precision=auto"):
        load_config("toy", overrides=f"model.precision={precision}", bf16=False)

def test_fp16_with_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="fp16 with FSDP2 is not known here.*ddp.yaml"): load_config("gemma-3-270m", bf16=False)
    assert load_config("gemma-3-270m", bf16=True).model.precision == "mixed"

def test_fp16_without_a_gpu_is_refused():
    if torch.cuda.is_available(): pytest.skip("a GPU is there")
    with pytest.raises(ConfigError, match="fp16 needs a CUDA GPU.*use model.precision=auto"): load_config(overrides="model.precision=fp16")

@pytest.mark.parametrize("capability, built, found", [
    ((9, 0), ["sm_75", "sm_90"], True), ((8, 0), ["sm_75", "sm_80", "compute_80"], True), ((7, 5), ["sm_75", "sm_90"], False),
    ((12, 0), ["sm_75", "sm_120a"], True), ((5, 2), ["sm_75", "sm_90"], "too old for torch.*CUDA_VISIBLE_DEVICES= to use the CPU")])
def test_what_a_gpu_says_of_itself(monkeypatch, capability, built, found):
    answers = {"is_available": True, "get_device_capability": capability, "get_arch_list": built, "get_device_name": "Some GPU"}
    for name, value in answers.items(): monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    if found in (True, False): assert gpu_has_bf16() is found
    else:
        with pytest.raises(ConfigError, match=found): gpu_has_bf16()

def test_another_machines_bf16_is_loaded_in_fp32_where_there_is_none(toy, monkeypatch):
    monkeypatch.setattr("gsm8k_sft.models.loading.gpu_has_bf16", lambda: False)
    assert {load_weights(toy, d).dtype for d in ("auto", "bf16", "fp32")} == {torch.float32}
    assert load_weights(toy, "fp16").dtype == torch.float16

def test_sums_over_tokens_do_not_overflow_fp16():
    "600 tokens that all mean the same word, as wide as Gemma's hidden states are"
    torch.manual_seed(0)
    hidden, weight = 100 + 100 * torch.rand(600, 16), torch.randn(40, 16) / 100
    targets, found = torch.full((600,), 3), {}
    for dtype in (torch.float32, torch.float16):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(h, w, targets, dtype=dtype)
        loss.backward()
        found[dtype] = loss.detach(), h.grad, w.grad
    assert found[torch.float32][2].abs().max() > 65_504
    for a, b in zip(found[torch.float16], found[torch.float32]):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * b.abs().max().item())

def test_scores_of_attention_do_not_overflow_fp16():
    "Queries and keys as large as Qwen2's biases make them"
    torch.manual_seed(0)
    q, k, v = (m * torch.ones(7, 2, 64) + torch.randn(7, 2, 64) for m in (40, 40, 0))
    packed = Packed(torch.tensor([0, 3, 7], dtype=torch.int32), 4)
    full, half = (plain_prefill(packed, q.to(t), k.to(t), v.to(t), 1 / 8, None, None).float() for t in (torch.float32, torch.float16))
    assert (q[0, 0] @ k[0, 0]) > 65_504 and half.isfinite().all()
    assert (full - half).abs().mean() < 0.2

@pytest.fixture
def own_runs(tmp_path, monkeypatch):
    for key in ("RUNS", "EVAL_RESULTS"): monkeypatch.setenv(f"GSM8K_SFT_PATHS_{key}", str(tmp_path / key))

def test_steps_that_overflow_are_skipped_and_no_error(own_runs, monkeypatch):
    "fp16 on the CPU: its autocast and its scaler are real, Accelerate only doesn't take them by itself there"
    def scaled(*args):
        trainer, log, signals = build_trainer(*args)
        trainer.accelerator.native_amp, trainer.accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**20)
        return trainer, log, signals
    monkeypatch.setattr("gsm8k_sft.train.build_trainer", scaled)
    cfg = load_config("toy", overrides="train.packing=true train.max_steps=12 train.eval_steps=12 train.save_steps=12 "
                      "train.validation_samples=2 train.keep_checkpoints=true train.warmup_steps=0 data.train_samples=300 "
                      "train.per_device_train_batch_size=4 evaluation.max_new_tokens=8")
    cfg.model.precision = "fp16" # load_config wants a GPU for it
    record, rows = train(cfg, evaluate=False), [r for r in read_log(folder_of(cfg)) if "loss" in r]
    skipped = [r["step"] for r in rows if r["grad_norm"] is None]
    assert record["status"] == "complete" and 0 < len(skipped) < 8 and skipped[0] == 1
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    scale = torch.load(folder_of(cfg) / "checkpoint-12" / "scaler.pt")["scale"]
    assert scale == 2.0 ** (20 - len(skipped)), "a resumed run goes on with this scale"

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_fp16_trains_as_bf16_does(tuning, own_runs):
    losses = {}
    for precision in ("mixed", "fp16"):
        cfg = load_config("toy", tuning, overrides=f"model.precision={precision} train.packing=true train.max_steps=60 train.eval_steps=30 "
                                                   "train.speedup=none lora_config.lora_dropout=0 run_name=" + precision)
        record = train(cfg, evaluate=False)
        rows = [r for r in read_log(folder_of(cfg)) if "loss" in r]
        losses[precision] = torch.tensor([r["loss"] for r in rows])
        assert record["precision"] == precision and sum(r["grad_norm"] is None for r in rows) < 10
    torch.testing.assert_close(losses["fp16"][-20:].mean(), losses["mixed"][-20:].mean(), rtol=0.1, atol=0)

def test_size_and_counts(toy):
    model = load_weights(toy, "fp32")
    n = count_parameters(model)["total"]
    assert n == sum(p.numel() for p in model.parameters()) and 4 * n <= model_size(model) < 4.1 * n


# LoRA

def gradients(cfg, ids, checkpointing):
    set_seed(0)
    model = prepare_for_training(load_model(cfg, training=True), cfg)
    if checkpointing: model.gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

def without_and_with_checkpointing(tuning, ids, dropout):
    for checkpointing in (False, True):
        cfg = config(tuning, f"train.gradient_checkpointing={checkpointing} lora_config.lora_dropout={dropout}")
        yield gradients(cfg, ids, checkpointing)

@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_checkpointing_changes_no_gradient(ids, tuning):
    plain, saved = without_and_with_checkpointing(tuning, ids, 0)
    assert plain.keys() == saved.keys()
    for n in plain: torch.testing.assert_close(saved[n], plain[n], rtol=1e-5, atol=1e-7)
    if tuning == "lora": assert all(g.abs().sum() > 0 for n, g in saved.items() if "lora_B" in n)

def test_checkpointing_recomputes_the_same_dropout(ids):
    plain, saved = without_and_with_checkpointing("lora", ids, 0.3)
    for n in plain: torch.testing.assert_close(saved[n], plain[n], rtol=1e-5, atol=1e-7)

def test_adapter_on_all_linear_layers_but_the_head():
    model = load_model(config(), training=True)
    layers = linear_layers(model)
    adapted = prepare_for_training(model, config())
    carries = {n.split(".lora_A")[0].removeprefix("base_model.model.") for n, _ in adapted.named_parameters() if "lora_A" in n}
    assert carries == set(layers) and not any("lm_head" in n or "embed" in n for n in carries)

def test_routers_of_experts_get_no_adapter(ids):
    from transformers import AutoConfig, AutoModelForCausalLM
    for kind in ("phimoe", "llama4_text"): # linear layers that return two tensors
        more = dict(num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2)
        model = add_adapter(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **more)), config())
        assert logits(model, ids).isfinite().all() and not any("router" in n and "lora" in n for n, _ in model.named_parameters())

def test_adapter_starts_at_the_base_model_and_is_seeded(toy, ids):
    base = logits(load_weights(toy, "fp32"), ids)
    prints = []
    for seed in (0, 0, 1):
        set_seed(seed)
        model = add_adapter(load_weights(toy, "fp32"), config())
        torch.testing.assert_close(logits(model, ids), base, rtol=0, atol=0)
        prints.append(weights_fingerprint(model))
    assert prints[0] == prints[1] != prints[2]

@pytest.mark.parametrize("targets", ["[query]", "[q_proj,w_o]"])
def test_unknown_target_lists_the_modules(targets):
    with pytest.raises(ModelError, match="is no linear layer.*down_proj.*q_proj"):
        add_adapter(load_model(config()), config(overrides=f"lora_config.target_modules={targets}"))

def test_rank_alpha_dropout_targets_reach_peft():
    changes = "lora_config.r=3 lora_config.lora_alpha=5 lora_config.lora_dropout=0.2 lora_config.target_modules=[q_proj,v_proj]"
    cfg = config(overrides=changes)
    lora = add_adapter(load_model(cfg), cfg).peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.bias, set(lora.target_modules)) == (3, 5, 0.2, "none", {"q_proj", "v_proj"})

def test_tuning_and_weights_must_agree():
    with pytest.raises(ModelError, match="qlora on dense weights"): prepare_for_training(load_model(config("lora")), config("qlora"))


# QLoRA; bitsandbytes quantises on the CPU too

@pytest.mark.skipif(not HAS_BNB, reason="bitsandbytes is not installed")
def test_qlora_learns_on_four_bits(ids):
    cfg = config("qlora", "model.precision=mixed train.gradient_checkpointing=true lora_config.lora_dropout=0")
    model = load_model(cfg, training=True)
    dense = load_model(cfg)
    assert count_parameters(model)["total"] == count_parameters(dense)["total"] and model_size(model) < model_size(dense) / 2
    model = prepare_for_training(model, cfg)
    found = precision_of(model)
    assert {d for d, n in found.items() if n["trainable"]} == {"float32"} and found["nf4"]["frozen"] > 0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16): model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    # in train mode: see the chapter on bitsandbytes' evaluation on the CPU
    with torch.no_grad(): near = model.train()(input_ids=ids).logits.float()
    assert torch.nn.functional.cosine_similarity(near.flatten(), logits(dense, ids).flatten(), dim=0) > 0.9
    with pytest.raises(ModelError, match="quantized=False"): merge_adapter(model)

@pytest.mark.skipif(not HAS_BNB, reason="bitsandbytes is not installed")
def test_qlora_run_is_loaded_in_four_bits_or_dense(tmp_path, ids):
    cfg = config("qlora", "model.precision=mixed")
    set_seed(0)
    model = filled(prepare_for_training(load_model(cfg, training=True), cfg))
    save_config(cfg, tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    write_json(tmp_path / "record.json", {"model_fingerprint": weights_fingerprint(resolve_model(cfg.model))})
    again, _ = load_tuned(tmp_path, quantized=True)
    assert "nf4" in precision_of(again)
    assert ("nf4" in precision_of(load_tuned(tmp_path)[0])) == torch.cuda.is_available()
    merged, _ = load_tuned(tmp_path, dtype="fp32", quantized=False, merge=True)
    assert set(precision_of(merged)) == {"float32"}


# Merging, fingerprints, runs

@pytest.mark.parametrize("dtype, bound", [("fp32", 1e-5), ("bf16", 0.05)])
def test_merged_equals_adapter(toy, ids, dtype, bound):
    set_seed(0)
    model = filled(add_adapter(load_weights(toy, dtype), config()))
    with model.disable_adapter(): base = logits(model, ids)
    before = logits(model, ids)
    merged = merge_adapter(model)
    def gap(x): return ((x - before).abs().max() / before.abs().max()).item()
    assert gap(logits(merged, ids)) < bound < gap(base)
    assert not any("lora" in n for n, _ in merged.named_parameters())

def test_merged_model_is_saved_and_loaded(toy, ids, tmp_path):
    set_seed(0)
    merged = merge_adapter(filled(add_adapter(load_weights(toy, "fp32"), config())))
    merged.save_pretrained(tmp_path / "m")
    load_tokenizer("toy").save_pretrained(tmp_path / "m")
    again = load_weights(resolve_model(str(tmp_path / "m")), "fp32")
    assert weights_fingerprint(again) == weights_fingerprint(merged) == weights_fingerprint(tmp_path / "m")
    torch.testing.assert_close(logits(again, ids), logits(merged, ids), rtol=0, atol=0)

def test_fingerprint_sees_every_value_and_no_type(toy):
    model = load_weights(toy, "fp32")
    first = weights_fingerprint(model)
    assert weights_fingerprint(model.to(torch.bfloat16)) == weights_fingerprint(toy) == first
    name, p = list(model.named_parameters())[-1]
    p.data.view(-1)[0] += 1
    assert weights_fingerprint(model) != first

def run_folder(tmp_path, cfg, model, tokenizer=None):
    save_config(cfg, tmp_path)
    write_json(tmp_path / "record.json", {"status": "complete", "model_fingerprint": weights_fingerprint(load_model(cfg, training=True))})
    model.save_pretrained(tmp_path / ("adapter" if tokenizer is None else "model"))
    if tokenizer is not None: tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path

@pytest.mark.parametrize("dtype", ["fp32", "bf16", None])
def test_lora_run_comes_back(toy, ids, tmp_path, dtype):
    cfg = config("lora", "model.precision=mixed")
    set_seed(0)
    model = filled(add_adapter(load_model(cfg, training=True), cfg))
    tuned, tokenizer = load_tuned(run_folder(tmp_path, cfg, model), dtype=dtype)
    assert weights_fingerprint(tuned) == weights_fingerprint(model) and not tuned.training
    assert tokenizer("12 + 30").input_ids == load_tokenizer("toy")("12 + 30").input_ids

def test_full_run_comes_back(toy, ids, tmp_path):
    model = load_weights(toy, "fp32")
    model.model.norm.weight.data += 0.1
    tuned, tokenizer = load_tuned(run_folder(tmp_path, config("full"), model, load_tokenizer("toy")))
    torch.testing.assert_close(logits(tuned, ids), logits(model, ids), rtol=0, atol=0)

def test_a_lora_run_is_its_adapter_whatever_lies_beside_it(toy, ids, tmp_path):
    cfg = config("lora", "evaluation.dtype=fp32")
    run_folder(tmp_path, cfg, filled(model := add_adapter(load_model(cfg), cfg)))
    shutil.copytree(toy, tmp_path / "model")
    torch.testing.assert_close(logits(load_tuned(tmp_path)[0], ids), logits(model, ids), rtol=0, atol=0)

def test_adapter_of_another_base_is_refused(tmp_path, folder):
    cfg = config("lora", f"model.path={folder}")
    run_folder(tmp_path / "run", cfg, filled(add_adapter(load_model(cfg), cfg)))
    other = load_weights(folder, "fp32")
    other.model.norm.weight.data += 0.1
    other.save_pretrained(folder)
    with pytest.raises(ModelError, match="trained on other base weights"): load_tuned(tmp_path / "run")

def test_adapter_of_a_deeper_base_is_refused_by_name(toy, tmp_path):
    from safetensors.torch import load_file, save_file
    add_adapter(load_weights(toy, "fp32"), config()).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {n.replace("layers.5.", "layers.6."): t.clone() for n, t in tensors.items() if "layers.5." in n}, file)
    with pytest.raises(ModelError, match=r"14 of its 98 tensors have no place there: model\.layers\.6\."):
        load_adapter(load_weights(toy, "fp32"), tmp_path)
    save_file({n: t for n, t in tensors.items() if "layers.5." not in n}, file)
    with pytest.raises(ModelError, match=r"missing adapter keys.*layers\.5\."): load_adapter(load_weights(toy, "fp32"), tmp_path)
    save_file(tensors | {(n := min(tensors)): tensors[n] * float("nan")}, file)
    with pytest.raises(ModelError, match=f"{re.escape(n)} .* not finite"): load_adapter(load_weights(toy, "fp32"), tmp_path)

def test_added_tokens_and_template_of_an_adapter_are_used(toy, tmp_path, ids):
    cfg = config("lora", "model.precision=fp32 evaluation.dtype=fp32")
    tokenizer, base = load_tokenizer("toy"), load_model(cfg, training=True)
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<end_of_turn>{% endfor %}"
    base.resize_token_embeddings(len(tokenizer))
    model = filled(add_adapter(base, cfg))
    save_config(cfg, tmp_path)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    tuned, own = load_tuned(tmp_path)
    assert own.chat_template == tokenizer.chat_template and own.convert_tokens_to_ids("<think>") == len(tokenizer) - 1
    asked = own("12 <think> 30", return_tensors="pt").input_ids
    torch.testing.assert_close(logits(tuned, asked), logits(model, asked), rtol=0, atol=0)
    add_adapter(load_model(cfg), cfg).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ModelError, match="has 769 tokens.*768"): load_tuned(tmp_path)

def test_adapter_of_another_shape_is_refused(toy, tmp_path):
    add_adapter(load_weights(toy, "fp32"), config()).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 4}))
    with pytest.raises(ModelError, match="doesn't fit the base model"): load_adapter(load_weights(toy, "fp32"), tmp_path)

@pytest.mark.parametrize("given, says", [
    (dict(peft_type="PROMPT_TUNING", num_virtual_tokens=4), "PROMPT_TUNING does more than change weights"),
    (dict(alora_invocation_tokens=[5]), "aLoRA does more than change weights"), (dict(init_lora_weights="pissa_niter_4"), "by chance")])
def test_adapters_that_are_not_there_in_the_model_inside_are_refused(given, says, toy, tmp_path):
    add_adapter(load_weights(toy, "fp32"), config()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    kept = json.loads(path.read_text()) if "peft_type" not in given else {"task_type": "CAUSAL_LM"}
    path.write_text(json.dumps(kept | given))
    with pytest.raises(ModelError, match=f"doesn't fit the base model: .*{says}"): load_adapter(load_weights(toy, "fp32"), tmp_path)

def test_repeated_layers_are_not_merged(toy):
    cfg = config()
    cfg.lora_config.layer_replication = [[0, 2], [1, 3]]
    with pytest.raises(ModelError, match="layer_replication.*can't be merged"): merge_adapter(add_adapter(load_weights(toy, "fp32"), cfg))

@pytest.mark.skipif(not HAS_BNB, reason="needs bitsandbytes")
def test_weights_in_8_bits_are_not_trained_in_full(toy, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    whole = AutoModelForCausalLM.from_pretrained(toy, quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32)
    cfg = load_config("toy")
    with pytest.raises(ModelError, match="full, but .* are stored as whole numbers.*use tuning=lora"): prepare_for_training(whole, cfg)

def test_pickled_or_missing_adapter(tmp_path, toy):
    with pytest.raises(ModelError, match="no adapter here"): adapter_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(ModelError, match="pickled adapters are not loaded"): adapter_folder(tmp_path)

def test_unfinished_run(tmp_path):
    save_config(config("full"), tmp_path)
    with pytest.raises(ModelError, match="has the run finished"): load_tuned(tmp_path)


# Counting

def test_published_counts():
    "The numbers of the model cards, and of peft's own report for gemma-2b at rank 16"
    published = {"gemma-2b-it": 2_506_172_416, "gemma-2-9b-it": 9_241_705_984, "gemma-3-270m": 268_098_176}
    for preset, n in published.items():
        assert count_parameters(meta_model(load_config(preset, training=False)))["total"] == n, preset
    table = parameter_table(load_config("gemma-2b-it", training=False)).set_index(["method", "targets"])
    assert table.loc[("lora", "all-linear"), "trainable"] == table.loc[("qlora", "all-linear"), "trainable"] == 19_611_648
    assert table.loc[("full", ""), "trainable %"] == 100 and 0.77 < table.loc[("lora", "all-linear"), "trainable %"] < 0.78

@pytest.mark.skipif(not HAS_BNB, reason="bitsandbytes is not installed")
def test_table_agrees_with_the_loaded_models():
    table = parameter_table(config(overrides="model.precision=mixed"), targets=("all-linear",)).set_index("method")
    for tuning in ("full", "lora", "qlora"):
        cfg = config(tuning, "model.precision=mixed")
        model = prepare_for_training(load_model(cfg, training=True), cfg)
        assert {k: table.loc[tuning, k] for k in ("total", "trainable")} == count_parameters(model)
        assert table.loc[tuning, "weights MiB"] == pytest.approx(model_size(model) / 2**20, rel=0.02)


# The command

def run_command(*args, **env):
    command = [sys.executable, "-m", "gsm8k_sft.models.loading", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **env})

def test_prepare_prints_the_folder(toy):
    done = run_command("--preset", "toy")
    assert done.returncode == 0 and Path(done.stdout.strip()) == toy

def test_prepare_says_what_is_wrong():
    done = run_command("--preset", "gemma-2b-it", HF_HUB_OFFLINE="1", HF_HUB_CACHE="/nonexistent")
    assert done.returncode == 1 and "preset=toy" in done.stderr and "Traceback" not in done.stderr
