"""Kinds of bad input, each as a user meets it: what is wrong, which command is given, and words of the sentence that says the way out

`python tests/faults/kinds.py` runs them all and writes what the user sees to messages.json, which the site shows."""
import contextlib, io, json, os, shutil, sys, tempfile, warnings
from pathlib import Path
from unittest.mock import patch
from gsm8k_sft.cli import main
from gsm8k_sft.core.config import CONFIGS, load_config
from gsm8k_sft.evaluation.results import result_name

MESSAGES = Path(__file__).parent / "messages.json"
SMALL = ("data.train_samples=8 data.test_samples=2 train.max_steps=1 train.warmup_steps=0 train.eval_steps=0 train.save_steps=1 "
         "train.keep_checkpoints=true evaluation.max_new_tokens=2 evaluation.batch_size=2 evaluation.other_texts=0")
EVALUATE = ["evaluate", "--preset=toy", "--shots=0", f"--overrides={SMALL}"]
ASK = ["--question", "What is 2 + 2?", "--max_new_tokens", "2"]
ROW = '{"question": "What is 1 and 99?", "answer": "1 + 99 = 100\\n#### 100"}\n'


def train(*overrides, **given):
    given = {"preset": "toy", "tuning": "lora"} | given
    return ["train", *(f"--{k}={v}" for k, v in given.items()), "--no_evaluate", "--overrides=" + " ".join([SMALL, *overrides])]

def ask(model, *more): return ["infer", "--model_path", str(model), *(more or ASK)]

def evaluate(*more): return ["evaluate", "--preset=toy", *more]


# Damage to a folder or a file

def put(name, content=""): return lambda folder: write(folder / name, content)
def cut(name, share=0.5): return lambda folder: write(folder / name, (data := (folder / name).read_bytes())[:int(len(data) * share)])
def gone(name): return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
def keys(name, **values): return lambda folder: write(folder / name, json.dumps(json.loads((folder / name).read_text()) | values))
def add(line, name="train.jsonl"): return lambda folder: write(folder / name, (folder / name).read_bytes() + encoded(line))
def index(value): return put("model.safetensors.index.json", json.dumps(value))
def all_of(*damages): return lambda folder: [damage(folder) for damage in damages]

def encoded(content): return content if isinstance(content, bytes) else content.encode()

def write(path, content=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(content))
    return path

def tensors(change, name="model.safetensors"):
    "Change the tensors of a file"
    def damage(folder):
        from safetensors.torch import load_file, save_file
        found = load_file(folder / name)
        save_file({k: t.contiguous() for k, t in (change(found) or found).items()}, folder / name, {"format": "pt"})
    return damage

def other_model(kind, **sizes):
    "Weights and configuration of an architecture that doesn't write"
    def damage(folder):
        import transformers
        (folder / "model.safetensors").unlink()
        config = getattr(transformers, kind.split("For")[0] + "Config")(**sizes)
        getattr(transformers, kind)(config).save_pretrained(folder)
    return damage

def without_layer(t): return {k: x for k, x in t.items() if "layers.5." not in k}
def deeper(t): return t | {k.replace("layers.5.", "layers.6."): x.clone() for k, x in t.items() if "layers.5." in k}
def not_finite(t): t["model.norm.weight"][0] = float("nan")


# The folder that a kind begins with; each gives the command's words

def a_model(damage, command=ask): return lambda box: damaged(box.model(), damage, command)
def a_run(damage, command=lambda run: ["evaluate", "--run", str(run)]): return lambda box: damaged(box.run(), damage, command)
def asked_run(*more): return a_run(put("note"), lambda run: ["evaluate", "--run", str(run), *more])
def a_killed_run(damage): return a_run(all_of(keys("record.json", status="running"), gone("adapter"), damage), lambda run: train())
def an_adapter(damage): return lambda box: damaged(box.adapter(), damage, lambda f: ask("toy", "--adapter_path", str(f), *ASK))
def problems(damage, command=lambda f: train("data.source=folder", f"data.folder={f}", "data.validation_fraction=0")):
    return lambda box: damaged(box.problems(), damage, command)
def a_result(damage): return lambda box: damaged(box.result(), damage, lambda folder: EVALUATE)
def an_archive(damage): return lambda box: damaged(box.archive(), damage, lambda folder: ["report", "--out", str(box.path / "out")])
def questions(content, *more):
    def prepare(box):
        path = write(box.path / "questions.jsonl", content)
        return ask("toy", "--input", str(path), "--output", str(box.path / "answers.jsonl"), *more)
    return prepare
def a_file(name, content, command): return lambda box: command(write(box.path / name, content))

def entry_in(folder, text, rows=ROW):
    write(folder / "mine" / "test.jsonl", rows)
    write(folder / "configs" / "dataset" / "mine.yaml", "data: {source: folder, folder: mine, trainable: false, " + text + "}\n")
def an_entry(*given): return lambda box: entry_in(box.path, *given) or evaluate("--dataset=mine", "--shots=0")
def a_study(text): return a_file("mine.yaml", f"preset: toy\n{text}\n", lambda f: ["sweep", str(f), "--dry_run"])
def an_export(damage, *more): return a_run(damage, lambda run: ["export", str(run), "--out", "out", *more])
def relabelled(damage, *more):
    return lambda box: damaged(box.result(), damage, lambda folder: ["evaluate", "--relabel", NAME, "--overrides", "data.test_samples=2", *more])

def damaged(folder, damage, command):
    damage(folder)
    return command(folder)

NAME = result_name(load_config("toy", overrides=SMALL, training=False), "base-0shot", 2)


class Box:
    "A user's folder, with copies of what others have made"
    def __init__(self, path, template): self.path, self.template = path, template
    def model(self): return Path(shutil.copytree(CONFIGS.parent / "assets" / "toy", self.path / "model"))
    def run(self):
        name = load_config("toy", "lora", overrides=SMALL).run_name
        return Path(shutil.copytree(self.template / "runs" / "toy" / name, self.path / "runs" / "toy" / name))
    def adapter(self): return Path(shutil.copytree(self.run() / "adapter", self.path / "adapter"))
    def result(self): return Path(shutil.copytree(self.template / "eval_results", self.path / "eval_results"))
    def archive(self):
        shutil.copytree(CONFIGS.parents[1] / "results", self.path / "results", ignore=shutil.ignore_patterns("gemma*", "qwen*", "earlier"))
        return self.path / "results" / "toy"
    def problems(self):
        for split, start in (("train", 0), ("test", 50)):
            rows = [{"question": f"What is {k} and 1?", "answer": f"{k} + 1 = {k + 1}\n#### {k + 1}"} for k in range(start, start + 12)]
            write(self.path / "problems" / f"{split}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
        return self.path / "problems"


STUDY = "methods: {full: {tuning: full, learning_rates: [1.0e-3]}}\nruns: {full: {method: full"

QUICK = { # configuration: seen before anything is loaded
    "a preset's name misspelt": (lambda box: evaluate()[:1] + ["--preset", "toi"], "Did you mean 'toy'"),
    "a preset's file that isn't there": (lambda box: train(preset="mine.yaml"), "there is no file mine.yaml"),
    "a method misspelt": (lambda box: train(tuning="lorra"), "Did you mean 'lora'"),
    "QLoRA without a GPU": (lambda box: train(tuning="qlora"), "use tuning=lora"),
    "a data set misspelt": (lambda box: train(dataset="man"), "Did you mean 'main'"),
    "a negative seed": (lambda box: train(seed=-1), "seed: -1 is outside"),
    "an override without =": (lambda box: train("train.max_steps"), "key=value"),
    "an override's key misspelt": (lambda box: train("train.learning_rat=1"), "Did you mean 'train.learning_rate'"),
    "an override of the wrong type": (lambda box: train("train.max_steps=many"), "train.max_steps"),
    "a number for yes or no": (lambda box: train("train.packing=2"), "expected one of [True, False]"),
    "an override of one item of a list": (lambda box: evaluate("--overrides=evaluation.shots[0]=3"), "give the whole list"),
    "a number out of range": (lambda box: train("train.learning_rate=-1"), "is outside (0, inf)"),
    "a quote that isn't closed": (lambda box: train("run_name='a"), "quote each pair as in a shell"),
    "a list that isn't closed": (lambda box: train("lora_config.target_modules=[q_proj"), "not readable as YAML"),
    "a reference to nothing": (lambda box: train("train.max_steps=${nope}"), "'train.max_steps': Interpolation key 'nope' not found"),
    "a file of one's own that isn't there": (lambda box: train(config="nope.yaml"), "no such configuration file"),
    "a file of one's own cut off": (a_file("mine.yaml", "train: {a: [\n", lambda f: train(config=f)), "not readable as YAML"),
    "a file of one's own that holds a list": (a_file("mine.yaml", "- a\n", lambda f: train(config=f)), "a mapping of keys is needed"),
    "a file of one's own that isn't text": (a_file("mine.yaml", b"\xff\xfe\0", lambda f: train(config=f)), "not readable as YAML"),
    "a file of one's own with a word for a section": (a_file("mine.yaml", "model: google/x\n", lambda f: train(config=f)), "model: a mapping of keys"),
    "a preset of one's own with an unknown key": (a_file("configs/preset/mine.yaml", "modl: 1\n", lambda f: train(preset=f)), "'modl'"),
    "a run's name that is an absolute path": (lambda box: train(f"run_name={box.path}/x"), "can't be a folder below runs"),
    "a run's name that leaves its folder": (lambda box: train("run_name=../x"), "can't be a folder below runs"),
    "a run's name that leaves its folder, with data sets to ask": (lambda box: train("run_name=../x", "evaluation.datasets=[main]"),
                                                                 "can't be a folder below runs"),
    "a run's name with spaces": (lambda box: train("'run_name=a b'"), "letters, digits and"),
    "a run's name of 300 letters": (lambda box: train("run_name=" + "ж" * 300), "at most 150 letters"),
    "settings.ini cut off": (a_file("settings.ini", "[paths]\nruns = r\n[wan", lambda f: train()), "settings.ini: can't be read"),
    "settings.ini with an unknown key": (a_file("settings.ini", "[paths]\nrun = r\n", lambda f: ["sweep"]), "Did you mean 'runs'"),
    "an unknown field of LoRA": (lambda box: train("lora_config.use_dorra=true"), "Did you mean 'use_dora'"),
    "layers for LoRA given as a word": (lambda box: train("lora_config.target_modules=q_proj"), "a list of module names"),
    "early stopping without validation": (lambda box: train("train.early_stopping_patience=1"), "needs train.eval_steps"),
    "several answers, all greedy": (lambda box: evaluate("--overrides=evaluation.samples=2"), "evaluation.temperature above 0"),
    "examples that are no number": (lambda box: evaluate("--shots=one"), "must be whole numbers"),
    "neither a preset nor a run": (lambda box: ["evaluate"], "--preset (its base model) or --run"),
    "no model for a question": (lambda box: ["infer", *ASK], "--model_path is missing"),
    "an empty question": (lambda box: ask("toy", "--question", " "), "the question is empty"),
    "half an emoji in a question": (lambda box: ask("toy", "--question", "half \ud83d"), "half of a character"),
    "no new tokens": (lambda box: ask("toy", "--question", "a", "--max_new_tokens=0"), "must be at least 1"),
    "a study cut off": (a_file("mine.yaml", "preset: toy\nmethods: {a: [", lambda f: ["sweep", str(f)]), "not readable as YAML"),
    "a study without its preset": (a_file("mine.yaml", "runs: {}\n", lambda f: ["sweep", str(f)]), "preset: is missing"),
    "a study with a seed twice": (a_study(f"{STUDY}, seeds: [0, 0]}}}}"), "runs.full.seeds: needs at least one value, each once"),
    "a study that asks with a key misspelt": (a_study(f"{STUDY}, ask: [evaluation.datsets=x]}}}}"), "Did you mean 'evaluation.datasets'"),
    "a study that would change the training to ask": (a_study(f"{STUDY}, ask: [seed=3]}}}}"), "only evaluation.* and data.*"),
    "a study that trains on a set for testing": (a_study(f"{STUDY}, datasets: [svamp]}}}}"), "svamp is for testing only"),
    "a study that compares one experiment": (a_study("pairs: [[base]]"), "a pair has two experiments"),
    "a study of robustness that there isn't": (lambda box: ["sweep", "robustness/gemma-3-270"], "Did you mean 'gemma-3-270m'"),
    "an entry without a licence": (an_entry("link: x"), "data.licence: is missing"),
    "an entry with an unknown key": (an_entry("license: MIT"), "Did you mean 'data.licence'"),
    "an entry that doesn't say where it lies": (a_file("configs/dataset/mine.yaml", "data: {licence: MIT}\n", lambda f: evaluate("--dataset=mine")),
                                                "must say where it lies"),
    "an entry of an unknown split": (an_entry("licence: MIT, files: {tets: a}"), "Did you mean 'test'"),
    "an entry that keeps rows by a word": (an_entry("licence: MIT, only: {kind: digit}"), "data.only.kind: digit is no list of values"),
    "training on a set for testing": (lambda box: train(dataset="svamp"), "is for testing only"),
    "a mixture of a set that there isn't": (a_file("configs/dataset/mine.yaml", "data: {mix: {man: 1}}\n", lambda f: train(dataset="mine")), "'main'"),
    "a mixture of itself": (a_file("configs/dataset/mine.yaml", "data: {mix: {mine: 1}}\n", lambda f: train(dataset="mine")), "is a mixture itself"),
    "an entry with a list of files": (an_entry("licence: MIT, files: {test: [a, b]}"), "must be one text, as in 'part-*.jsonl'"),
    "a data set for a run": (lambda box: ["evaluate", "--run", "runs/none", "--dataset=svamp"], "go with --preset: a run has its own"),
    "nothing to export": (lambda box: ["export"], "name a run and a folder"),
    "an export of no run": (lambda box: ["export", "runs/none", "--out", "out"], "no config.yaml here"),
    "labels for answers that there aren't": (lambda box: ["evaluate", "--relabel", "none"], "no such predictions"),
    "labels and a number of problems": (lambda box: ["evaluate", "--relabel", "none", "--limit=3"], "asks nothing again"),
    "a study with an unknown key": (a_file("mine.yaml", "preset: toy\nmethds: {}\n", lambda f: ["sweep", str(f)]), "'methds'"),
}
LINE = "line 13"
DATA = {
    "a column that no row has": (an_entry("licence: MIT, question: problem"), "data.question can name another of: question, answer"),
    "braces without a column": (an_entry("licence: MIT, question: '{} is?'"), "the field '{} is?' is missing"),
    "a selection that no row is in": (an_entry("licence: MIT, only: {kind: [z]}", '{"question": "a", "answer": "#### 1", "kind": "x"}\n'), "kind is 'x' there"),
    "two splits in one file": (lambda box: entry_in(box.path, "licence: MIT") or write(
        box.path / "configs" / "dataset" / "mine.yaml", "data: {folder: mine, licence: MIT, files: {train: test.jsonl, test: test.jsonl}}\n"
    ) and evaluate("--dataset=mine", "--shots=0"), "data.only can part them by a column"),
    "a generator that fails": (lambda box: write(box.path / "made.py", "def rows(split):\n    return [1 / 0]\n") and a_file(
        "configs/dataset/mine.yaml", "data: {source: generator, generator: made.rows, licence: MIT}\n", lambda f: train(dataset="mine"))(box),
                               "fails with ZeroDivisionError: division by zero (…/made.py:2)"),
    "an infinite number in a question": (an_entry("licence: MIT, question: '{question} {n}'", '{"question": "a", "answer": "#### 1", "n": Infinity}\n'),
                                         "the field 'n' is inf"),
    "a set without a box": (an_entry("licence: MIT, final: boxed"), "has no \\boxed{...}"),
    "a set of formulas with an answer missing": (an_entry("licence: MIT, finals: latex", '{"question": "a", "answer": "b"}\n'), "no '####'"),
    "a set without final answers": (an_entry("licence: MIT, finals: text"), "has no final answers to grade"),
    "a set's file with a byte order mark": (an_entry("licence: MIT", b"\xef\xbb\xbf" + ROW.encode()), "save it as UTF-8 without one"),
    "no folder with the data": (lambda box: train("data.source=folder", "data.folder=nope"), "there is no folder"),
    "no training file": (problems(gone("train.jsonl")), "neither train.jsonl nor"),
    "an empty training file": (problems(put("train.jsonl")), "the file is empty"),
    "a line that isn't JSON": (problems(add("{broken\n")), f"{LINE}: not valid JSON"),
    "a file cut off": (problems(cut("train.jsonl", 0.7)), "not valid JSON"),
    "a byte order mark": (problems(put("train.jsonl", b"\xef\xbb\xbf" + ROW.encode())), "save it as UTF-8 without one"),
    "UTF-16": (problems(put("train.jsonl", ROW.encode("utf-16"))), "save it as UTF-8"),
    "bytes that aren't UTF-8": (problems(add(b'{"question": "\xff", "answer": "a"}\n')), f"{LINE}: not UTF-8"),
    "half an emoji in the data": (problems(add('{"question": "\\ud83d", "answer": "a\\n#### 1"}\n')), "U+D83D"),
    "a row without an answer": (problems(add('{"question": "a"}\n')), "the field 'answer' is missing"),
    "an answer without its number": (problems(add('{"question": "a", "answer": "b"}\n')), "must end in one line such as '#### 72'"),
    "an ambiguous number": (problems(add('{"question": "a", "answer": "b\\n#### 1,2"}\n')), "does not end in a number"),
    "a question twice": (problems(lambda f: add((f / "train.jsonl").read_text().split("\n")[0])(f)), "the same question as"),
    "a test problem in the training file": (problems(lambda f: add((f / "test.jsonl").read_text().split("\n")[0])(f)), "same question"),
    "no example short enough": (lambda box: train("data.max_length=5"), "check data.max_length"),
    "LoRA on layers that there aren't": (lambda box: train("lora_config.target_modules=[q_prj]"), "it has down_proj"),
    "a file where the runs should be": (a_file("runs", "", lambda f: train()), "move away what is in the way"),
    "a file where the results should be": (a_file("eval_results", "", lambda f: EVALUATE), "results can't be written here"),
}
MODEL = {
    "no such model folder": (lambda box: ask("./nope"), "no such model folder"),
    "a folder without a model": (lambda box: ask(box.path), "no config.json"),
    "config.json cut off": (a_model(cut("config.json")), "not a valid JSON file"),
    "config.json with a list": (a_model(put("config.json", "[]")), "can't be loaded"),
    "an unknown architecture": (a_model(keys("config.json", model_type="gemma9")), "does not recognize this architecture"),
    "a model with code of its own": (a_model(all_of(
        keys("config.json", model_type="own", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}),
        put("c.py", "open('ran', 'w')"))), "which gsm8k_sft never runs"),
    "an encoder and decoder": (a_model(other_model("T5ForConditionalGeneration", vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1,
                                                   num_heads=2)), "T5 is no causal language model"),
    "an encoder": (a_model(other_model("RobertaForCausalLM", vocab_size=768, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                       num_attention_heads=2)), "reads ahead as an encoder"),
    "weights missing": (a_model(gone("model.safetensors")), "no *.safetensors"),
    "weights cut off": (a_model(cut("model.safetensors")), "incomplete"),
    "weights that are a pointer of Git LFS": (a_model(put("model.safetensors", "version https://git-lfs.github.com/spec/v1\n")), "header"),
    "weights of another shape": (a_model(keys("config.json", intermediate_size=64)), "other shapes than its config.json says"),
    "a tensor too few": (a_model(tensors(lambda t: t.pop("model.norm.weight") is None)), "model.norm.weight"),
    "a tensor too many": (a_model(tensors(deeper)), "are not in the model"),
    "weights that aren't finite": (a_model(tensors(not_finite)), "model.norm.weight holds values that are not finite"),
    "only pickled weights": (a_model(lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin")), "only pickled weights"),
    "an index of weights cut off": (a_model(put("model.safetensors.index.json", '{"weight_map": {"a"')), "not readable as JSON"),
    "an index that names no files": (a_model(index({"weight_map": None})), "no JSON object with the key 'weight_map'"),
    "an index without its table": (a_model(index({})), "no JSON object with the key 'weight_map'"),
    "a weight file of several missing": (a_model(index({"weight_map": {"a": "model-1.safetensors"}})), "fetch it again"),
    "weights and an adapter in one folder": (a_model(put("adapter_config.json", "{}")), "to a folder of their own"),
    "no tokenizer": (a_model(gone("tokenizer.json")), "tokenizer.save_pretrained"),
    "a tokenizer cut off": (a_model(cut("tokenizer.json")), "its tokenizer can't be loaded"),
    "a chat template that raises": (a_model(put("chat_template.jinja", "{{ raise_exception('no system role') }}")), "prompt_style=plain"),
    "a chat template cut off": (a_model(put("chat_template.jinja", "{% for m in messages %}")), "prompt_style=plain"),
    "a chat template for parts of messages": (a_model(put("chat_template.jinja",
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}<end_of_turn>{% endfor %}")), "leaves out the question"),
    "a chat template without generation prompt": (a_model(put(
        "chat_template.jinja", "{% for m in messages %}<start_of_turn>{{m.role}}\n{{m.content}}<end_of_turn>\n{% endfor %}")),
        "use data.prompt_style=plain"),
    "chat asked of a model without template": (a_model(gone("chat_template.jinja"), lambda f: ask(f, *ASK, "--prompt_style=chat")),
                                              "use plain or auto"),
    "a file that isn't GGUF": (a_file("m.gguf", "PK", ask), "not a GGUF file"),
    "a name that is no model's": (lambda box: ask("a b/c?d"), "neither a folder that exists nor a hub id"),
    "an optimizer and no weights": (a_model(lambda f: (f / "model.safetensors").rename(f / "optimizer.bin")), "no *.safetensors"),
    "a GGUF file in a folder that is named": (a_model(lambda f: (f / "model.safetensors").rename(f / "a.gguf")), "a.gguf: name that file itself"),
    "a SentencePiece tokenizer without its library": (a_model(lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model")), "SentencePiece"),
    "examples longer than the model reads": (a_model(keys("config.json", max_position_embeddings=40), lambda f: train(f"model.path={f}")),
                                             "set data.max_length=40"),
    "a question longer than the model reads": (lambda box: ask("toy", "--question", "How many? " * 3000), "leave it out"),
    "the memory plan of a damaged model": (a_model(cut("config.json"), lambda f: ["plan", "--preset=toy", f"--overrides=model.path={f}"]),
                                          "not a valid JSON file"),
}
RUN = {
    "no such adapter": (lambda box: ask("toy", "--adapter_path", "nope", *ASK), "no adapter here"),
    "adapter_config.json cut off": (an_adapter(cut("adapter_config.json")), "adapter_config.json: not readable as JSON"),
    "an adapter of another rank": (an_adapter(keys("adapter_config.json", r=3)), "doesn't fit the base model"),
    "an adapter of a deeper model": (an_adapter(tensors(deeper, "adapter_model.safetensors")), "have no place there"),
    "an adapter of a model with fewer layers": (an_adapter(tensors(without_layer, "adapter_model.safetensors")), "missing adapter keys"),
    "an adapter's weights cut off": (an_adapter(cut("adapter_model.safetensors")), "incomplete"),
    "an adapter that isn't finite": (an_adapter(tensors(lambda t: t[min(t)].fill_(float("nan")) is None, "adapter_model.safetensors")), "not finite"),
    "no such run": (lambda box: ["evaluate", "--run", "runs/none"], "no config.yaml here"),
    "a run that isn't finished": (a_run(gone("adapter")), "has the run finished"),
    "a run's config.yaml cut off": (a_run(put("config.yaml", "preset: toy\ntuning_method: lora\n")), "was it cut off"),
    "a run's record.json cut off": (a_run(cut("record.json")), "delete it and run that step again"),
    "a run's record of a later version": (a_run(keys("record.json", schema_version=9)), "schema version 9"),
    "an override that would change the training": (asked_run("--overrides=seed=3"), "would change"),
    "examples before a tuned model's question": (asked_run("--shots=3"), "go with --preset: a run has its own"),
    "going on with a damaged record": (a_killed_run(cut("record.json")), "record.json: not valid JSON"),
    "going on with a damaged config.yaml": (a_killed_run(put("config.yaml", "a: [\n")), "config.yaml: not readable as YAML"),
    "going on with a damaged log": (a_killed_run(put("log.jsonl", '{"step": 1, "lo\n{"step": 1}\n')), "move the file away"),
    "going on with other base weights": (a_killed_run(keys("record.json", model_fingerprint="0" * 64)), "give the run another name"),
    "an evaluation's record cut off": (a_result(cut(f"{NAME}.json")), "delete it and run that step again"),
    "answers so far that are damaged": (a_file(f"eval_results/{NAME}.partial.jsonl", '{"a": 1}\n{"id": \n{}\n', lambda f: EVALUATE),
                                       "line 2: not valid JSON; delete"),
    "an archive's records cut off": (an_archive(cut("records.jsonl")), "records.jsonl: missing or damaged"),
    "an archive's answers cut off": (an_archive(cut("answers.parquet")), "answers.parquet: missing or damaged"),
    "an export of a run that isn't finished": (an_export(keys("record.json", status="interrupted")), "the run is interrupted"),
    "an export of a run without its weights": (an_export(gone("adapter")), "has the run finished"),
    "an export into somebody's folder": (an_export(lambda run: write(run.parents[2] / "out" / "mine.txt")), "nothing of yours is overwritten"),
    "an export in no precision": (an_export(put("note"), "--dtype=bf8"), "is not one of fp32, bf16, fp16"),
    "a push to no repository": (an_export(put("note"), "--push=model"), "not of the form org/name"),
    "a push of what was never evaluated": (an_export(put("note"), "--push=org/model"), "was never evaluated"),
    "labels for answers that were cut off": (relabelled(cut(f"{NAME}.predictions.jsonl", 0.7)), "answers are missing"),
    "labels of other questions": (relabelled(lambda folder: entry_in(folder.parent, "licence: MIT"), "--dataset=mine"), "questions is in the other data set"),
    "no file of questions": (lambda box: ask("toy", "--input", "none.jsonl", "--output", "a.jsonl"), "no such file"),
    "no question in the file": (questions("\n"), "no question could be read"),
    "an output that is there already": (lambda box: (write(box.path / "answers.jsonl", "x"), questions(ROW)(box))[1], "--overwrite"),
    "an output that is a device": (lambda box: ask("toy", "--input", str(write(box.path / "q", ROW)), "--output=/dev/full", "--overwrite"),
                                  "takes a file name"),
    "an output below a file": (a_file("f", ROW, lambda f: ask("toy", "--input", str(f), "--output", f"{f}/a.jsonl")), "can't be written"),
}
KINDS = QUICK | DATA | MODEL | RUN


def meet(name, path, template):
    "Do what the kind says in an empty folder: exit code (None for a traceback), what is said, and files that came into being"
    path.mkdir(parents=True)
    own = {f"GSM8K_SFT_PATHS_{k.upper()}": str(path / k) for k in ("runs", "eval_results", "results", "cache")} | {"HF_HUB_OFFLINE": "1"}
    out, err, here, code = io.StringIO(), io.StringIO(), os.getcwd(), None
    with patch.dict(os.environ, own), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ.pop("GSM8K_DIR", None)
        os.chdir(path)
        try:
            command = KINDS[name][0](Box(path, template))
            before = set(path.rglob("*"))
            main([str(word) for word in command])
            said = "nothing: it went through"
        except SystemExit as e:
            code, said = (e.code, err.getvalue()) if isinstance(e.code, int) else (1, str(e.code))
            if code and "is written to" in out.getvalue(): said += "\nannounced, and then refused"
        finally: os.chdir(here)
    new = {p.name for p in set(path.rglob("*")) - before if "cache" not in p.parts and p.suffix != ".png" and not (p.is_dir() and any(p.iterdir()))}
    return code, said.strip().replace(str(path), "…"), new # verdicts that are cached and figures that are drawn are whole by themselves


def make_template(path):
    "A trained run and an evaluation"
    with patch.dict(os.environ, {f"GSM8K_SFT_PATHS_{k.upper()}": str(path / k) for k in ("runs", "eval_results", "cache")}):
        for command in (train(), EVALUATE): main(command)
    return path


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as tmp:
        template, found = make_template(Path(tmp) / "template"), {}
        for i, name in enumerate(KINDS):
            try: code, found[name], new = meet(name, Path(tmp) / str(i), template)
            except Exception as e: code, found[name], new = None, f"a traceback: {e!r}", None
            if not code or KINDS[name][1] not in found[name] or new: print(f"{name}: {code}, {found[name]}, {new}", file=sys.stderr)
    MESSAGES.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
