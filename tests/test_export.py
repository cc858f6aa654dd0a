"A run as others get it: plain transformers answers the same, the card says what the records say, nothing is lost or half-written"
import base64, contextlib, hashlib, io, json, os, re, resource, shutil, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from gsm8k_sft import export
from gsm8k_sft.core.config import ConfigError, choices, load_config, project_root, reporters
from gsm8k_sft.core.runs import read_config, read_json, run_folder, save_config, write_json
from gsm8k_sft.data.datasets import load_gsm8k
from gsm8k_sft.evaluate import evaluate_base
from gsm8k_sft.evaluation.archive import glob_files, read_bytes
from gsm8k_sft.evaluation.results import read_predictions
from gsm8k_sft.export import base_model, export_run, publish, run_evaluations
from gsm8k_sft.generation.generate import stop_tokens
from gsm8k_sft.grading.answers import grade
from gsm8k_sft.infer import answer, open_model
from gsm8k_sft.models.adapters import add_adapter, load_tuned
from gsm8k_sft.models.export import ExportError, export_weights, new_folder
from gsm8k_sft.models.loading import load_model
from gsm8k_sft.train import train

SMALL = ("data.train_samples=64 data.test_samples=50 train.max_steps=6 train.eval_steps=0 evaluation.max_new_tokens=40 "
         "evaluation.other_texts=0")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Folders of runs and results for all tests here"
    folder, mp = tmp_path_factory.mktemp("home"), pytest.MonkeyPatch()
    for key in ("runs", "eval_results"): mp.setenv(f"GSM8K_SFT_PATHS_{key}".upper(), str(folder / key))
    mp.setenv("TRACKIO_DIR", str(folder / "trackio")) # read when trackio is imported
    yield folder
    mp.undo()


@pytest.fixture(scope="module")
def runs(home):
    "A short LoRA and a short full run, evaluated on 50 problems as their base was; each exported by the command"
    found = {}
    for tuning in ("lora", "full"):
        cfg = load_config("toy", tuning, overrides=f"{SMALL} run_name={tuning}")
        if not found: evaluate_base(cfg, [0], progress=False)
        train(cfg)
        found[tuning] = run_folder(cfg)
        export.main(str(found[tuning]), str(home / "out" / tuning))
    return found

def plain(folder): return (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))

def contents(folder): return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_plain_transformers_answers_the_same(runs, home, tuning):
    model, tokenizer = plain(home / "out" / tuning)
    [evaluation] = run_evaluations(runs[tuning])
    asked = read_predictions(evaluation)
    assert len(asked) == 50
    for batch in (asked[:25], asked[25:]):
        inputs = tokenizer([a["prompt"] for a in batch], add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left")
        answers = model.generate(**inputs)[:, inputs["input_ids"].shape[1]:]
        assert tokenizer.batch_decode(answers, skip_special_tokens=True) == [a["text"] for a in batch]
    with torch.no_grad(): found, expected = model(**inputs).logits, load_tuned(runs[tuning])[0](**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_card_says_what_the_records_say(runs, home, tuning):
    folder, [evaluation], record = home / "out" / tuning, run_evaluations(runs[tuning]), read_json(runs[tuning] / "record.json")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert [r.metric_value for r in card.data.eval_results] == [round(100 * v["value"], 2) for v in evaluation["accuracy"].values()]
    for v in evaluation["accuracy"].values():
        assert f"{100 * v['value']:.1f} [{100 * v['low']:.1f}, {100 * v['high']:.1f}]" in card.text
    for fact in (record["data"]["fingerprint"], evaluation["protocol"]["fingerprint"], record["environment"]["packages"]["torch"],
                 f"{record['parameters']['trainable']:,}", "of the same 50 problems right (strict)", "base zero-shot", "One training run",
                 f"--preset toy --tuning {tuning}", "train.max_steps: 6", "Generated problems, not GSM8K"): assert fact in card.text, fact
    assert ("merged into them in fp32" in card.text) == (tuning == "lora")
    texts = [p.read_text() for p in folder.iterdir() if p.suffix != ".safetensors"]
    assert not [t for t in texts if str(home) in t or str(project_root()) in t], "no path of this machine"


def test_the_code_in_the_card_runs(runs, home):
    code = re.search(r"```python\n(.*?)```", (home / "out" / "lora" / "README.md").read_text(), re.S)[1]
    said = io.StringIO()
    with contextlib.redirect_stdout(said): exec(code.replace('folder = "lora"', f"folder = {str(home / 'out' / 'lora')!r}"), {})
    model, tokenizer, cfg = open_model(runs["lora"])
    told = answer(cfg.one_shot_example.question, model, tokenizer, max_new_tokens=cfg.evaluation.max_new_tokens)
    assert said.getvalue().strip() == told["answer"].strip() != ""


def random_adapter(folder, overrides, tuning="lora"):
    "A run folder with an adapter that nobody trained"
    cfg = load_config("toy", tuning, overrides=overrides, training=False)
    set_seed(0)
    model = add_adapter(load_model(cfg, dtype="fp32"), cfg)
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_A" not in name: p.data += 0.05 * torch.randn_like(p)
    save_config(cfg, folder)
    model.save_pretrained(folder / "adapter")
    return folder


@pytest.mark.parametrize("overrides", [
    "lora_config.use_dora=true", "lora_config.use_rslora=true", "lora_config.target_modules=[q_proj,down_proj]",
    "lora_config.modules_to_save=[embed_tokens]", "lora_config.modules_to_save=[lm_head]", "lora_config.modules_to_save=[norm]",
    "evaluation.dtype=bf16"])
def test_every_adapter_is_merged_whole(tmp_path, overrides):
    "Tied weights that an adapter has parted are saved apart"
    run = random_adapter(tmp_path / "run", overrides)
    with new_folder(tmp_path / "out") as part: found = export_weights(run, part, stop_tokens)
    model, tokenizer = plain(tmp_path / "out")
    inputs = tokenizer("<bos>Ann has 3 pens and buys 4.", add_special_tokens=False, return_tensors="pt")
    with torch.no_grad(): a, b = model(**inputs).logits.float(), load_tuned(run)[0](**inputs).logits.float()
    assert (a - b).abs().max() < (0.1 if "bf16" in overrides else 1e-3) * b.abs().max()
    assert found["dtype"] == read_config(run).evaluation.dtype


def test_weights_that_answer_otherwise_are_not_exported(runs, tmp_path, monkeypatch):
    "The folder is loaded again and compared"
    monkeypatch.setattr("gsm8k_sft.models.export.merge_adapter", lambda model: model.unload()) # the adapter is forgotten
    with pytest.raises(ExportError, match="don't give the logits of the run"): export_run(runs["lora"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_generate_stops_where_the_evaluation_stops(runs, tmp_path):
    "At the special tokens, too, that the model's own settings name; what else they say is left out"
    run = shutil.copytree(runs["full"], tmp_path / "run")
    own = {"eos_token_id": [1, 4], "do_sample": True, "temperature": 0.7, "repetition_penalty": 1.1}
    (run / "model" / "generation_config.json").write_text(json.dumps(own))
    settings = json.loads((export_run(run, tmp_path / "out") / "generation_config.json").read_text())
    assert set(settings["eos_token_id"]) == {1, 4, 5} and settings["do_sample"] is False and settings["max_new_tokens"] == 40
    assert not settings.keys() & {"temperature", "repetition_penalty"}


def test_qlora_says_that_it_learned_beside_other_weights(runs, tmp_path):
    shutil.copytree(runs["lora"], tmp_path / "run")
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(text.replace("method: lora", "method: qlora").replace("variant: lora", "variant: qlora"))
    card = (export_run(tmp_path / "run", tmp_path / "out") / "README.md").read_text()
    assert "QLoRA of toy" in card and "beside 4-bit weights" in card and "never evaluated" in card


def test_an_evaluation_of_other_weights_is_left_out(runs, tmp_path, capsys):
    "The run was trained anew since"
    found = {"types": "float32", "fingerprint": "0" * 64}
    assert run_evaluations(runs["full"], found) == [] and "trained anew" in capsys.readouterr().out
    assert len(run_evaluations(runs["full"])) == 1


@pytest.mark.parametrize("change", ["foreign", "unread", "edited", "added", "file"])
def test_what_is_not_ours_stays(runs, home, tmp_path, change):
    out = tmp_path / "out"
    if change == "foreign": (out.mkdir(), (out / "thesis.tex").write_text("years"))
    elif change == "unread": (out.mkdir(), (out / "memory").symlink_to("/proc/self/mem")) # a file that can't be read
    elif change == "file": out.write_text("years")
    else: shutil.copytree(home / "out" / "full", out)
    if change == "edited": (out / "README.md").write_text("by hand")
    if change == "added": (out / "model.gguf").write_text("converted")
    look = {"file": Path.read_text, "unread": os.listdir}.get(change, contents)
    before = look(out)
    with pytest.raises(ExportError, match="name (another|a) folder"): export_run(runs["full"], out)
    assert before == look(out) and len(list(tmp_path.iterdir())) == 1


def test_an_earlier_export_and_a_killed_one_are_replaced(runs, home, tmp_path):
    out = shutil.copytree(home / "out" / "full", tmp_path / "out")
    (killed := tmp_path / ".out.part").mkdir()
    (killed / "model.safetensors").write_bytes(b"half")
    (other := tmp_path / ".mine.part").mkdir()
    before = contents(out)
    assert export_run(runs["full"], out) == out.resolve()
    assert before.keys() == contents(out).keys() and before["model.safetensors"] == contents(out)["model.safetensors"]
    assert sorted(tmp_path.iterdir()) == [other, out]


def test_a_full_disk_leaves_nothing(runs, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard)) # no file can grow beyond, as if the disk were full
    try:
        with pytest.raises(SystemExit, match="disk is full"): export.main(str(runs["full"]), str(tmp_path / "out"))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, says", [
    ((), "name a run and a folder"), (("runs/none", "out"), "no config.yaml here"), (("{run}", "out", "bf8"), "--dtype: 'bf8' is not"),
    (("{run}", "out", "", "", "mine"), "--push mine: not of the form org/name"),
    (("{run}", "out", "", "a: b"), "license: 'a: b' isn't as a hub"),
    (("{begun}", "out"), "the run is interrupted"),
    (("{begun}", "out", "", "", "org/name"), "was never evaluated: .*--unevaluated")])
def test_wrong_requests_are_one_line(runs, tmp_path, arguments, says):
    begun = tmp_path / "begun"
    save_config(read_config(runs["full"]), begun)
    write_json(begun / "record.json", {"status": "interrupted"})
    with pytest.raises(SystemExit, match=says) as e: export.main(*(a.format(run=runs["full"], begun=begun) for a in arguments))
    assert "\n" not in str(e.value) and not Path("out").exists()


def test_a_licence_that_is_no_word_is_refused_from_python_too(runs, tmp_path):
    "It would break the head of the card"
    with pytest.raises(export.ExportError, match="license: 'a: b' isn't as a hub"):
        export.export_run(runs["full"], tmp_path / "out", license="a: b")
    assert not list(tmp_path.iterdir())


# Licences

def test_every_preset_has_a_licence():
    for preset in choices("preset"): assert base_model(load_config(preset, training=False))[1], preset


def test_the_base_models_own_card_comes_first(tmp_path):
    cfg = load_config("toy")
    cfg.model.path = str(shutil.copytree(base_model(cfg)[2], tmp_path / "toy-copy"))
    assert base_model(cfg)[:2] == ("toy", "apache-2.0")
    (tmp_path / "toy-copy" / "README.md").write_text("---\ntags: [a]\nlicense: 'cc-by-4.0'\n---\nlicense: mit\n")
    assert base_model(cfg)[:2] == ("toy", "cc-by-4.0")
    cfg.model.path = str(shutil.copytree(tmp_path / "toy-copy", tmp_path / "other", ignore=shutil.ignore_patterns("README.md")))
    assert base_model(cfg)[:2] == ("other", None), "a path may lead to any model"
    cfg.model.name, cfg.model.path = cfg.model.path, None
    assert base_model(cfg)[:2] == ("other", None), "and so may a name; no card shows where it lay"


def test_terms_go_along(runs, tmp_path):
    run, base = shutil.copytree(runs["full"], tmp_path / "run"), shutil.copytree(base_model(load_config("toy"))[2], tmp_path / "base")
    for name in ("NOTICE.md", "GEMMA_TERMS.html", "LICENSE", "notes.txt"): (base / name).write_text(name)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("path: null", f"path: {base}"))
    out = export_run(run, tmp_path / "out", license="gemma")
    assert {p.name for p in out.iterdir()} >= {"NOTICE.md", "GEMMA_TERMS.html", "LICENSE"} and not (out / "notes.txt").exists()
    card = (out / "README.md").read_text()
    assert "license: gemma" in card and "ai.google.dev/gemma/terms" in card and str(tmp_path) not in card


# A hub of our own

class Hub(BaseHTTPRequestHandler):
    "As much of a hub as an upload needs"
    def log_message(self, *args): pass
    def reply(self, value, code=200):
        body = json.dumps(value).encode()
        self.send_response(code)
        for k, v in {"Content-Type": "application/json", "Content-Length": len(body)}.items(): self.send_header(k, str(v))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        repo = self.path.split("/models/")[1]
        if repo not in self.repos: return self.reply({"error": "Repository not found"}, 404)
        self.reply({"id": repo, "private": self.repos[repo]["private"], "siblings": []})
    def do_PUT(self):
        self.blobs[self.path.split("/")[-1]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.reply({})
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer right": return self.reply({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            made = json.loads(body)
            repo = f"{made['organization']}/{made['name']}"
            if repo in self.repos: return self.reply({"url": f"{self.address}/{repo}"}, 409)
            self.repos[repo] = {"private": made.get("private") or made.get("visibility") == "private", "files": {}}
            return self.reply({"url": f"{self.address}/{repo}"})
        if self.path == "/api/validate-yaml": return self.reply({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            mode = lambda path: {"path": path, "uploadMode": "lfs" if path.endswith(".safetensors") else "regular", "shouldIgnore": False}
            return self.reply({"files": [mode(f["path"]) for f in json.loads(body)["files"]]})
        if self.path.endswith("/objects/batch"):
            upload = lambda o: {**o, "actions": {"upload": {"href": f"{self.address}/blobs/{o['oid']}"}}}
            return self.reply({"transfer": "basic", "objects": [upload(o) for o in json.loads(body)["objects"]]})
        repo = re.fullmatch(r"/api/models/(.+)/commit/main", self.path)[1]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file": self.repos[repo]["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "lfsFile": self.repos[repo]["files"][line["value"]["path"]] = self.blobs[line["value"]["oid"]]
        self.reply({"success": True, "commitUrl": f"{self.address}/{repo}/commit/1", "commitOid": "1" * 40})


@pytest.fixture
def hub(monkeypatch):
    handler = type("OwnHub", (Hub,), {"repos": {}, "blobs": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.address = f"http://127.0.0.1:{server.server_port}"
    for name, value in (("ENDPOINT", handler.address), ("HF_HUB_DISABLE_XET", True)): monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "right")
    yield handler
    server.shutdown()
    server.server_close()


def test_the_command_pushes_the_folder_to_a_private_repository(runs, home, tmp_path, hub):
    command = ["-m", "gsm8k_sft.export", str(runs["lora"]), "--out", str(tmp_path / "out"), "--push", "org/lora"]
    done = subprocess.run([sys.executable, *command], cwd=project_root(), capture_output=True, text=True,
                          env=os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"})
    assert done.returncode == 0 and f"{hub.address}/org/lora/commit/1 (private)" in done.stdout, done.stdout + done.stderr
    assert hub.repos["org/lora"]["private"] is True
    assert hub.repos["org/lora"]["files"] == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert "# org/lora" in (tmp_path / "out" / "README.md").read_text()


def test_public_only_if_said(home, runs, hub):
    publish(home / "out" / "full", "org/open", public=True)
    assert hub.repos["org/open"]["private"] is False
    hub.repos["org/open"]["files"] = {}
    with pytest.raises(ExportError, match="there already and public"): publish(home / "out" / "full", "org/open")
    assert hub.repos["org/open"]["files"] == {}


@pytest.mark.parametrize("break_it, says", [
    (lambda folder: (folder / "README.md").unlink(), "no model card"),
    (lambda folder: (folder / "README.md").write_text("---\nlicense: unknown\n---\n"), "names no licence"),
    (lambda folder: (folder / "README.md").write_text("no head"), "names no licence"),
    (lambda folder: (folder / "README.md").write_text("---\nlicense: a: b\n---\n"), "README.md: its head can't be read: mapping values"),
    (lambda folder: (folder / "README.md").write_text("---\nlicense: mit\n---\n"), "never evaluated")])
def test_nothing_is_pushed_without_card_licence_and_accuracy(home, runs, hub, tmp_path, break_it, says):
    break_it(folder := shutil.copytree(home / "out" / "full", tmp_path / "out"))
    with pytest.raises(ExportError, match=says): publish(folder, "org/full")
    assert not hub.repos
    if says == "never evaluated":
        publish(folder, "org/full", unevaluated=True)
        assert hub.repos["org/full"]["files"]


def test_a_hub_that_refuses_is_one_line(home, runs, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "wrong")
    says = r"org/full: not pushed \(.*401.*is whole: `hf auth login`"
    with pytest.raises(ExportError, match=says) as e: publish(home / "out" / "full", "org/full")
    assert "\n" not in str(e.value) and not hub.repos
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ExportError, match="org/full: not pushed"): publish(home / "out" / "full", "org/full")


def test_the_card_of_a_mixture_names_each_set_and_its_licence(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"A bus makes {i} trips of {i + 2} km. How far is that?", "answer": f"#### {i * (i + 2)}"} for i in range(2, 40)]
    for name, text in (("settings.ini", "[paths]\nruns = runs\n"), ("trips.jsonl", "\n".join(map(json.dumps, rows))),
                       ("configs/dataset/trips.yaml", "data: {source: folder, folder: ., files: {train: trips.jsonl}, licence: CC0}"),
                       ("configs/dataset/both.yaml", "data: {mix: {toy: 0.01, trips: 1}}")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    train(cfg := load_config("toy", "lora", "both", overrides="train.max_steps=2 train.eval_steps=0"), evaluate=False)
    card = (export_run(run_folder(cfg), tmp_path / "out") / "README.md").read_text()
    assert "problems of generated word problems (`toy`) and `trips`, made" in card and "Generated problems, not GSM8K" not in card
    assert "The data it was trained on: `toy`, Apache-2.0; `trips`, CC0." in card
    (tmp_path / "configs/dataset/trips.yaml").unlink()
    says = "trips.*; the card names the licence of each set of data.mix"
    with pytest.raises(ExportError, match=says): export_run(run_folder(cfg), tmp_path / "2")
    assert not (tmp_path / "2").exists()


# Trackers

def test_trackers_are_checked_before_anything_runs():
    assert reporters(load_config(overrides="train.report_to=wandb")) == ["wandb"] and reporters(load_config()) == ["auto"]
    for wrong in ("tensorbord", "[wandb,none]", "null", "7"):
        with pytest.raises(ConfigError, match="train.report_to: .*is not one of"): load_config(overrides=f"train.report_to={wrong}")
    for name in ("tensorboard", "trackio"):
        asked = f"train.report_to=[wandb,{name}]"
        assert reporters(load_config(overrides=asked, training=False)) == ["wandb", name], "what was trained elsewhere can be read"
        if find_spec(name): continue
        with pytest.raises(ConfigError, match=f"^train.report_to: {name} isn't installed: pip install {name}$"):
            load_config(overrides=asked)


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_a_tracker_gets_every_step_and_the_summary(home, tracker):
    pytest.importorskip(tracker)
    cfg = load_config("toy", "lora", overrides=f"{SMALL} run_name={tracker} train.report_to={tracker} evaluation.max_new_tokens=8")
    record, values = train(cfg), {}
    [evaluation] = run_evaluations(run_folder(cfg))
    if tracker == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        board = EventAccumulator(str(run_folder(cfg) / "tensorboard")).Reload()
        values = {tag: [e.value for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    else:
        import sqlite3
        with sqlite3.connect(next((home / "trackio").glob("*.db"))) as db:
            rows = [json.loads(text) for text, in db.execute("select metrics from metrics")]
        for row in rows: values |= {k: [*values.get(k, []), v] for k, v in row.items()}
    assert len(values["train/loss"]) >= 6 and values["final_loss"] == [pytest.approx(record["final_loss"])]
    for grader, v in evaluation["accuracy"].items():
        for end, at in (("", "value"), ("_low", "low"), ("_high", "high")):
            assert values[f"test/accuracy_{grader}{end}"] == [pytest.approx(v[at])]


# lm-evaluation-harness

def test_strict_and_flexible_are_the_harness_s_filters():
    "On every stored answer of the studies, by the task's own file"
    harness = pytest.importorskip("lm_eval")
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters import build_filter_ensemble
    task = yaml.safe_load((Path(harness.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    ignore = {k: task["metric_list"][0][k] for k in ("regexes_to_ignore", "ignore_case", "ignore_punctuation")}
    paths = glob_files(project_root() / "results", "*/eval/*.predictions.jsonl")
    stored = {(a["text"], a["gold"]) for p in paths for a in map(json.loads, read_bytes(p).splitlines())}
    texts, golds = zip(*sorted(stored))
    assert len(texts) > 10_000
    verdicts = [grade(t, f"#### {g}") for t, g in zip(texts, golds)]
    for of_task, ours in zip(task["filter_list"], ("strict", "flexible")):
        steps = [(f["function"], {k: v for k, v in f.items() if k != "function"}) for f in of_task["filter"] if f["function"] == "regex"]
        [found] = [f().apply([[t] for t in texts], None) for f in build_filter_ensemble(of_task["name"], steps).filters]
        theirs = [bool(exact_match_hf_evaluate([x], [f"#### {g}"], **ignore)["exact_match"]) for [x], g in zip(found, golds)]
        assert theirs == [v[ours] for v in verdicts]


@pytest.mark.slow
def test_the_harness_s_own_command_finds_our_numbers(home, tmp_path):
    "Of an export, on problems in a folder laid out as the hub has them, asked as the training asked them"
    harness = pytest.importorskip("lm_eval")
    longer = "run_name=harness data.train_samples=null train.max_steps=120 evaluation.max_new_tokens=96"
    cfg = load_config("toy", "full", overrides=f"{SMALL} {longer}")
    train(cfg)
    folder, problems = export_run(run_folder(cfg), tmp_path / "model"), load_gsm8k(load_config("toy", training=False))
    (data := tmp_path / "openai" / "gsm8k").joinpath("main").mkdir(parents=True)
    for split in ("train", "test"):
        rows = problems[split].select(range(50)).select_columns(["question", "answer"])
        rows.to_parquet(data / "main" / f"{split}-00000-of-00001.parquet")
    files = "".join(f"{{split: {s}, path: main/{s}-*}}, " for s in ("train", "test"))
    (data / "README.md").write_text(f"---\nconfigs: [{{config_name: main, data_files: [{files}]}}]\n---\n")
    task = Path(harness.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    (tmp_path / "plain.yaml").write_text(f'include: {task}\ntask: plain\ndoc_to_text: "{{{{question}}}}"\n')
    asked = ["--model", "hf", "--model_args", f"pretrained={folder},dtype=float32", "--tasks", "plain", "--include_path", ".",
             "--device", "cpu", "--num_fewshot", "0", "--apply_chat_template", "--output_path", "out", "--log_samples"]
    done = subprocess.run([sys.executable, "-m", "lm_eval", *asked], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert not done.returncode, done.stderr[-2000:]
    [path], [evaluation] = (tmp_path / "out").rglob("samples*.jsonl"), run_evaluations(run_folder(cfg))
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    for theirs, ours in (("strict-match", "strict"), ("flexible-extract", "flexible")):
        answers = [s for s in samples if s["filter"] == theirs]
        right = [bool(s["exact_match"]) for s in answers]
        assert right == [grade(s["resps"][0][0], s["doc"]["answer"])[ours] for s in answers]
        assert 0 < sum(right) == evaluation["accuracy"][ours]["k"] < len(right) == 50
