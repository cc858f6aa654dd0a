"Configuration, settings, files of one's own, ranges, LoRA's settings by PEFT, run names, the console command"
import ast, configparser, dataclasses, json, os, re, shutil, subprocess, sys, typing
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from gsm8k_sft.cli import COMMANDS, command_parser, main
from gsm8k_sft.core.config import (
    CONFIGS, SETTINGS, check_config, choices, Config, config_file, config_layers, ConfigError, empty_config, load_config, merge_layer,
    project_path, project_root, setting)
from gsm8k_sft.core.runs import git_commit, read_config, save_config

ROOT = project_root(Path(__file__).parent)


def load(overrides="", preset="toy", tuning="lora", **kwargs): return load_config(preset, tuning, overrides=overrides, **kwargs)


@pytest.fixture
def empty(tmp_path, monkeypatch):
    "An empty working folder outside the clone"
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith("GSM8K_SFT_")]: monkeypatch.delenv(name)
    return tmp_path


# Messages

def test_messages_name_keys_in_full():
    "What a message says of a setting can be pasted: evaluation.max_new_tokens, not max_new_tokens"
    cfg, free = OmegaConf.to_container(empty_config()), ("lora_config.", "train.lr_scheduler_kwargs.", "model.save_pretrained")
    keys = {f"{section}.{key}" for section, found in cfg.items() if isinstance(found, dict) for key in found}
    short = {key.partition(".")[2] for key in keys if "_" in key.partition(".")[2]}
    arguments = {("sampling.py", "top_p"), ("generate.py", "batch_size"), ("generate.py", "max_new_tokens"), ("config.py", "hub_name")}
    def said(path): # the texts of its errors and of what it prints
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) or getattr(getattr(node, "func", None), "id", "") in ("print", "print_once", "within"):
                yield from (n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    words = [(path.name, word) for path in (ROOT / "gsm8k_sft").rglob("*.py") if path.name != "_modidx.py"
             for text in said(path) for word in re.findall(r"(?<![\w.-])[a-z_]+(?:\.[a-z_]+)*(?!\w)", text)]
    wrong = {(name, word) for name, word in words if word in short
             or word.partition(".")[0] in cfg and "." in word and word not in keys and not word.startswith(free)}
    assert wrong == arguments and ("config.py", "train.num_train_epochs") in words


# Settings

def test_without_settings_the_working_folder_is_the_root(empty):
    assert project_root() == empty and project_path("cache", "tokens") == empty / ".cache" / "tokens"
    assert (setting("wandb", "mode"), setting("paths", "gsm8k")) == ("off", "")


def test_the_nearest_settings_above_count_and_other_tools_files_do_not(empty):
    (inner := empty / "a" / "b").mkdir(parents=True)
    (empty / "settings.ini").write_text("[wandb]\nmode = offline\n")
    (empty / "a" / "settings.ini").write_text("[DEFAULT]\nlib_name = other\n")
    assert project_root(inner) == empty
    assert (setting("wandb", "mode", empty), setting("paths", "runs", empty)) == ("offline", "runs")


@pytest.mark.parametrize("text, says", [
    ("[paths]\nrun = x\n", "'run' is not one of runs, .* Did you mean 'runs'"), ("[paths]\nruns\n", "can't be read")])
def test_a_wrong_settings_file_is_named(empty, text, says):
    (empty / "settings.ini").write_text(text)
    with pytest.raises(ConfigError, match=says): setting("paths", "runs")
    with pytest.raises(ConfigError, match="no key 'attic'"): setting("paths", "attic")


def test_the_clones_settings_are_the_defaults():
    ini = configparser.ConfigParser(interpolation=None)
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    assert {s: dict(ini[s]) for s in ini.sections()} == SETTINGS


def test_the_clone_is_found_from_its_notebooks():
    assert project_root(ROOT / "nbs" / "core") == ROOT


def test_configuration_imports_nothing_slow(empty):
    code = ("import sys; from gsm8k_sft.core.config import load_config; load_config('toy', 'lora', training=False); "
            "from gsm8k_sft.core.runs import main; main('gemma-2b-it', 'lora'); " # as make names a run
            "print([m for m in ('torch', 'peft', 'transformers', 'pandas') if m in sys.modules])")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.splitlines() == ["runs/gemma-2b-it/lora_main-s0", "[]"], done.stderr


# Files of one's own

def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


TOY = (CONFIGS / "preset" / "toy.yaml").read_text(encoding="utf-8")

def test_a_preset_by_name_and_by_path(empty):
    write(empty / "configs" / "preset" / "mine.yaml", TOY + "lora_config: {r: 5}\n")
    write(empty / "configs" / "variant" / "mine_lora.yaml", "train: {learning_rate: 3.0e-3}\n")
    assert "mine" in choices("preset") and "toy" in choices("preset")
    by_name, by_path = load(preset="mine"), load(preset="configs/preset/mine.yaml")
    assert by_name == by_path == load(preset=str(empty / "configs" / "preset" / "mine.yaml"))
    assert (by_name.preset, by_name.lora_config.r, by_name.train.learning_rate, by_name.run_name) == ("mine", 5, 3e-3, "lora_main-s0")


def test_files_of_the_project_are_found_in_its_folders(empty, monkeypatch):
    write(empty / "settings.ini", "[paths]\n")
    write(empty / "configs" / "preset" / "mine.yaml", TOY)
    (empty / "notebooks").mkdir()
    monkeypatch.chdir(empty / "notebooks")
    assert config_file("preset", "mine") == empty / "configs" / "preset" / "mine.yaml"


def test_a_name_belongs_to_one_file(empty):
    write(empty / "configs" / "preset" / "toy.yaml", TOY)
    for name in ("toy", "configs/preset/toy.yaml", str(CONFIGS / "preset" / "toy.yaml")):
        with pytest.raises(ConfigError, match="preset 'toy': several files have this name, .* give yours another"): load(preset=name)


def test_in_the_packages_own_folder_its_files_are_not_twice(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    assert load(preset="toy").preset == load(preset="configs/preset/toy.yaml").preset == "toy"


@pytest.mark.parametrize("name, says", [
    ("toi", "Did you mean 'toy'"), ("gone.yaml", "there is no file gone.yaml"), ("../toy", "is not one of")])
def test_a_preset_that_there_is_not(empty, name, says):
    with pytest.raises(ConfigError, match=says): load(preset=name)


def test_a_file_that_its_name_does_not_find_is_said(tmp_path, monkeypatch):
    "Names find files that end in .yaml; a path is looked for in the working folder alone"
    monkeypatch.chdir(tmp_path)
    (folder := tmp_path / "configs" / "preset").mkdir(parents=True)
    for name in ("mine.yml", "yours.yaml"): shutil.copy(config_file("preset", "toy"), folder / name)
    assert config_file("preset", "configs/preset/mine.yml").name == "mine.yml" and config_file("preset", "yours").name == "yours.yaml"
    for name, why in (("mine", "mine.yml is found by its path.* once it ends in .yaml"), ("mine.yml", "do you mean .*preset/mine.yml"),
                      ("yours.yml", "do you mean .*/yours.yaml"), ("toy.yaml", "do you mean .*/toy.yaml"), ("none.yaml", r"\)$")):
        with pytest.raises(ConfigError, match=why): config_file("preset", name)


def test_a_dataset_of_ones_own(empty, monkeypatch):
    from gsm8k_sft.data.datasets import load_gsm8k
    monkeypatch.delenv("GSM8K_DIR", raising=False)
    for split in ("train", "test"):
        rows = [{"question": f"What is {i} and 1 in the {split} part?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(20)]
        write(empty / "mine" / f"{split}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    write(empty / "configs" / "dataset" / "adding.yaml", "data: {source: folder, folder: mine, licence: MIT}\n")
    cfg = load("data.validation_fraction=0.1", dataset="adding")
    assert (cfg.variant, cfg.run_name[:13], cfg.data.dataset) == ("lora_adding", "lora_adding-s", "adding")
    assert len(load_gsm8k(cfg, splits=["train"])["train"]) == 18


@pytest.mark.parametrize("text", ["", "data: {source: synthetic, licence: MIT}", "data: {source: auto, licence: MIT}"])
def test_a_dataset_of_ones_own_says_where_it_lies(empty, text):
    "Neither the toy's generated problems nor a folder of GSM8K's are another set's"
    write(empty / "configs" / "dataset" / "adding.yaml", text or "data: {}")
    with pytest.raises(ConfigError, match="data.dataset: 'adding' is your own, so its file must say where it lies"): load(dataset="adding")


def test_a_study_by_name_and_by_path(empty):
    text = (CONFIGS / "study" / "gemma-3-270m.yaml").read_text(encoding="utf-8")
    path = write(empty / "configs" / "study" / "small.yaml", text)
    assert config_file("study", "small") == config_file("study", "configs/study/small.yaml") == path


# Numbers

def fields(schema=Config, prefix=""):
    for f in dataclasses.fields(schema):
        if dataclasses.is_dataclass(f.type): yield from fields(f.type, f"{prefix}{f.name}.")
        else: yield prefix + f.name, f


def test_every_number_has_a_range():
    numeric = {key: f for key, f in fields() if {int, float} & {f.type, *typing.get_args(f.type)}}
    assert len(numeric) > 30 and not [key for key, f in numeric.items() if "interval" not in f.metadata]


def test_every_range_refuses_what_lies_outside():
    for key, f in fields():
        if "interval" not in f.metadata: continue
        low, high = f.metadata["interval"][1:-1].split(",")
        outside = [f"-{float(low) + 7:.0f}"] + ([f"{float(high) + 1:.0f}"] if high.strip() != "inf" else [])
        if f.type is float: outside += ["nan", "-inf", "inf"]
        for value in outside:
            given = f"[{value}]" if f.type == list[int] else value
            with pytest.raises(ConfigError, match=rf"^{key}: .* is outside [\[(]"): load(f"{key}={given}")


@pytest.mark.parametrize("given, says", [
    ("data.train_samples=-1", r"data.train_samples: -1 is outside \[1, inf\); null means all"),
    ("data.test_samples=-1", "null means all"), ("train.learning_rate=inf", "train.learning_rate: inf"),
    ("train.adam_beta1=2", r"\[0, 1\)"),
    ("evaluation.temperature=1e-45", r"outside \[0.001, inf\); 0 is greedy"),
    ("train.learning_rate=???", "train.learning_rate: \\?{3} is no value"),
    ("train.max_steps=0", "-1 is train.num_train_epochs"), ("train.learning_rate=.nan", "nan"), ("seed=-1", "seed: -1")])
def test_numbers_that_libraries_take(given, says):
    with pytest.raises(ConfigError, match=says): load(given)


def test_limits_that_belong_to_a_range():
    cfg = load("data.train_samples=null train.max_steps=-1 evaluation.top_p=1 train.weight_decay=0 train.eval_steps=0 train.adam_beta1=0")
    assert cfg.data.train_samples is None and cfg.train.max_steps == -1


@pytest.mark.parametrize("name", ["/tmp/x", "../x", "a/b", "", "."])
def test_a_run_name_is_a_folders_name(name):
    with pytest.raises(ConfigError, match="run_name"): load([f"run_name='{name}'"])


# Names

def test_the_order_of_overrides_counts_where_it_matters():
    def name(overrides): return load(overrides).run_name
    assert name("train.max_steps=1 train.max_steps=2") != name("train.max_steps=2 train.max_steps=1")
    assert name("train.max_steps=1 train.eval_steps=0") == name("train.eval_steps=0 train.max_steps=1")
    whole, part = "train.lr_scheduler_kwargs={min_lr:null}", "train.lr_scheduler_kwargs.min_lr=1e-4"
    assert name([whole.replace(":", ": "), part]) != name([part, "train.lr_scheduler_kwargs.min_lr=2e-4"])
    assert name("train.max_steps=20") == "lora_main-s0-3defa6", "runs of earlier versions keep their names"


# LoRA's settings are PEFT's

PEFT = {"use_dora": True, "use_rslora": True, "modules_to_save": ["embed_tokens"], "init_lora_weights": "gaussian", "bias": "lora_only",
        "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2], "rank_pattern": {"q_proj": 2}}

def test_merging_leaves_what_was_merged_as_it_was():
    "OmegaConf's unsafe merge changes its first argument, and what later layers say must not reach earlier ones"
    given = "train.max_steps=3 lora_config.target_modules=[q_proj] evaluation.shots=[2] train.lr_scheduler_kwargs.min_lr=1e-7 seed=5"
    layers, cfg = config_layers("toy", "lora", "main", 0, None, given), empty_config()
    before = [OmegaConf.to_container(layer) for _, layer in layers]
    for source, layer in layers: cfg = merge_layer(cfg, layer, source)
    assert [OmegaConf.to_container(layer) for _, layer in layers] == before
    one, other = load_config("toy", overrides="evaluation.shots=[3]"), load_config("toy")
    one.lora_config.target_modules, one.evaluation.shots[0] = ["x"], 4
    assert (other.lora_config.target_modules, list(other.evaluation.shots)) == ("all-linear", [0, 1])
    assert load_config("toy") == other


def test_every_field_reaches_the_model():
    from gsm8k_sft.models.adapters import prepare_for_training
    from gsm8k_sft.models.loading import load_model
    cfg = load([f"lora_config.{key}={json.dumps(value)}" for key, value in PEFT.items()])
    model = prepare_for_training(load_model(cfg, training=True), cfg)
    found = model.peft_config["default"]
    for key, value in PEFT.items(): assert getattr(found, key) == (set(value) if key == "target_modules" else value), key
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layers = {name.split(".layers.")[1].split(".self_attn")[0] for name in trained if "lora_A" in name}
    assert layers == {"0", "2"} and any("lora_magnitude_vector" in name for name in trained)
    assert any("embed_tokens.modules_to_save" in name for name in trained)
    assert {p.shape[0] for name, p in trained.items() if "q_proj" in name and "lora_A" in name} == {2}
    scaling = model.base_model.model.model.layers[0].self_attn.v_proj.scaling["default"]
    assert scaling == pytest.approx(cfg.lora_config.lora_alpha / cfg.lora_config.r**0.5), "rank-stabilised"


def test_an_adapter_with_peft_fields_is_saved_and_loaded_again(tmp_path):
    import torch
    from gsm8k_sft.models.adapters import prepare_for_training
    from gsm8k_sft.models.loading import load_adapter, load_model
    cfg, ids = load("lora_config.use_dora=true lora_config.modules_to_save=[embed_tokens]"), torch.arange(5, 25)[None]
    model = prepare_for_training(load_model(cfg, training=True), cfg)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(tmp_path)
    again = load_adapter(load_model(cfg, training=True), tmp_path)
    torch.testing.assert_close(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits, rtol=0, atol=0)
    save_config(cfg, tmp_path)
    assert read_config(tmp_path) == cfg and read_config(tmp_path).lora_config.use_dora is True


@pytest.mark.parametrize("given, says", [
    ("use_dorra=true", "peft.LoraConfig has no such field. Did you mean 'use_dora'"),
    ("use_dora=maybe", "'maybe' is not of the type <class 'bool'>"),
    ("r=many", "could not be converted to Integer"),
    ("modules_to_save=lm_head", "is not of the type"), ("task_type=CAUSAL_LM", "gsm8k_sft sets it"),
    ("inference_mode=true", "gsm8k_sft sets it"), ("layers_to_transform=[0]", "PEFT refuses it"),
    ("init_lora_weights=eva", "a pass over the data"), ("init_lora_weights=pissa_niter_4", "by chance.*use pissa"),
    ("alora_invocation_tokens=[5]", "aLoRA"), ("rank_pattern.q_proj=0", "rank_pattern: q_proj: 0 must be above 0"),
    ("alpha_pattern.q_proj=-1", "alpha_pattern: q_proj: -1 must be above 0"),
    ("lora_dropout=1.5", "is outside"), ("target_modules=q_proj", "neither 'all-linear' nor a list"), ("target_modules=[]", "neither")])
def test_what_peft_does_not_take(given, says):
    for tuning in ("lora", "full"):
        with pytest.raises(ConfigError, match=f"lora_config.*{says}"): load(f"lora_config.{given}", tuning=tuning)


@pytest.mark.parametrize("given", [
    "modules_to_save=[nothing]", "modules_to_save=['(']", "rank_pattern.q_prj=2", "init_lora_weights=nonsense", "bias=sometimes",
    "trainable_token_indices=[9999]", "trainable_token_indices=[-1]"])
def test_what_the_model_does_not_have(given):
    from gsm8k_sft.models.adapters import add_adapter
    from gsm8k_sft.models.loading import load_model
    from gsm8k_sft.models.sources import ModelError
    cfg = load(f"lora_config.{given}")
    with pytest.raises(ModelError, match="lora_config"): add_adapter(load_model(cfg, training=True), cfg)


@pytest.mark.parametrize("given, says", [
    ("train.packing=2", "key 'train.packing': Invalid value '2', expected one of"), ("evaluation.calculator=-1", "Invalid value '-1'"),
    ("train.packing=null", "key 'train.packing': Incompatible value 'None' for field of type 'bool'"),
    ("train.check_memory=maybe", "Invalid value 'maybe'"), ("data.trainable=0.5", "Invalid value '0.5'"),
    ("qlora_config.double_quant=7", "Invalid value '7'"), ("evaluation.datasets=[[main]]", "no list of single"),
    ("evaluation.shots=[[1]]", r"evaluation.shots: \[\[1\]\] is no list of single values"),
    ("evaluation.datasets=[{a: 1}]", "evaluation.datasets: .* is no list of single values")])
def test_what_a_type_of_omegaconf_takes_besides(given, says):
    "Whole numbers for true and false, lists within lists"
    with pytest.raises(ConfigError, match=says): load([given])
    assert load("train.packing=true evaluation.calculator=no").train.packing is True


# Old runs

def test_every_recorded_configuration_is_readable():
    paths = sorted((ROOT / "results").rglob("config.yaml"))
    for path in paths: check_config(read_config(path))


def test_a_configuration_from_before_keys_were_added(tmp_path):
    cfg = OmegaConf.to_container(load())
    for key in ("packing", "max_tokens", "speedup"): del cfg["train"][key]
    for key in ("engine", "samples"): del cfg["evaluation"][key]
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(cfg)))
    old = read_config(tmp_path)
    assert (old.train.packing, old.train.speedup, old.evaluation.engine) == (False, "none", "auto")


def test_the_commit_is_that_of_the_code(empty):
    for command in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "mine"]):
        subprocess.run(["git", *command], check=True)
    mine = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert git_commit() is None or not git_commit().startswith(mine)


# The console command

def test_parsers_are_those_of_the_modules():
    from fastcore.script import anno_parser
    from gsm8k_sft.analysis import main as compare
    assert command_parser("compare").format_help() == anno_parser(compare.__wrapped__, prog="gsm8k-sft compare").format_help()
    for name in COMMANDS: assert command_parser(name).format_help()


def test_help_and_wrong_options_import_nothing_slow(empty):
    code = ("import sys\nfrom gsm8k_sft.cli import main\n"
            "for words in (['--help'], ['train', '--help'], ['train', '--presett', 'toy'], []):\n"
            "    try: main(words)\n    except SystemExit: pass\nprint([m for m in ('torch', 'transformers') if m in sys.modules])")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip().endswith("[]") and "Train and evaluate one variant" in done.stdout, done.stderr


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as stopped: main(["trian"])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and not said.out and len(said.err.splitlines()) == 1 and "Did you mean 'train'" in said.err


def test_options_with_underscores_and_dashes(capsys):
    for option in ("--dry_run", "--dry-run"):
        main(["sweep", option])
        assert "toy lora_main-s0" in capsys.readouterr().out


def test_the_console_command_finds_a_generator_in_the_working_folder(empty):
    (empty / "makers.py").write_text("def rows(split): return [{'question': f'{split} {i}?', 'answer': '#### 1'} for i in range(3)]\n")
    (empty / "configs" / "dataset").mkdir(parents=True)
    (empty / "configs" / "dataset" / "made.yaml").write_text("data: {source: generator, generator: makers.rows, licence: own}\n")
    code = "import sys; sys.path.remove(''); from gsm8k_sft.cli import main; main(['evaluate', '--preset', 'toy', '--dataset', 'made'])"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "toy__test__base-0shot__toy__made: 3 problems" in done.stdout, done.stderr


def test_the_console_command_takes_a_study_by_name():
    from gsm8k_sft.cli import command_parser
    assert command_parser("sweep").parse_args(["gemma-3-270m", "--workers", "2"]).name == "gemma-3-270m"
    assert command_parser("sweep").parse_args([]).name == ""
