"Commands killed fifty times, on full disks, in folders that can't be written, after a clock that went back, two at once"
import contextlib, json, multiprocessing, os, random, resource, shutil, subprocess, time
import pytest
from safetensors.torch import load_file
from gsm8k_sft.reporting.logs import read_log

pytestmark = pytest.mark.slow

SMALL = ("data.train_samples=32 data.test_samples=40 train.per_device_train_batch_size=2 train.gradient_accumulation_steps=2 "
         "train.num_train_epochs=2 train.eval_steps=0 train.save_steps=3 train.packing=false lora_config.lora_dropout=0.1 "
         "evaluation.max_new_tokens=24 evaluation.batch_size=4 evaluation.save_every=1 evaluation.shots=[0] evaluation.other_texts=0")
TRAIN = ["train", "--preset=toy", "--tuning=lora", "--no-evaluate", f"--overrides={SMALL}"]
EVALUATE = ["evaluate", "--preset=toy", f"--overrides={SMALL}"]
INFER = ["infer", "--model_path=toy", "--input=questions.jsonl", "--output=answers.jsonl", "--max_new_tokens=24", "--batch_size=4"]
KILLS = 25 # of training, and as many of evaluation

server = multiprocessing.get_context("forkserver") # libraries are imported once, and each command is a process of its own
server.set_forkserver_preload(["gsm8k_sft.cli", "gsm8k_sft.train", "gsm8k_sft.infer"])


def run(command, folder, bytes_a_file=None):
    "What the process does: the console command in a folder; what it says goes to the file `said`"
    from gsm8k_sft.cli import main
    said = os.open(folder / f"said-{os.getpid()}", os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2): os.dup2(said, stream)
    os.chdir(folder)
    os.environ.update({f"GSM8K_SFT_PATHS_{k.upper()}": str(folder / k) for k in ("runs", "eval_results", "cache")}, OMP_NUM_THREADS="1")
    if bytes_a_file is not None: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, resource.RLIM_INFINITY))
    main(command)


def start(command, folder, *more):
    process = server.Process(target=run, args=(command, folder, *more))
    process.start()
    return process


def finish(*processes, folder):
    "Exit code and words of each"
    for p in processes: p.join(300)
    return [(p.exitcode, (folder / f"said-{p.pid}").read_text()) for p in processes]


def fresh(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    lines = [json.dumps({"question": f"Tom has {i} pens and buys {i} more. How many has he?"}) + "\n" for i in range(40)]
    (folder / "questions.jsonl").write_text("".join(lines))
    return folder


def trained(folder):
    "Weights and log of the run"
    home = next((folder / "runs" / "toy").glob("lora*[0-9a-f]"))
    log = [[row[k] for k in ("step", "loss", "grad_norm", "learning_rate", "tokens")] for row in read_log(home, strict=True)]
    return {k: v.tolist() for k, v in load_file(home / "adapter" / "adapter_model.safetensors").items()}, log

def answered(folder):
    "The answers of the evaluation"
    path = next((folder / "eval_results").glob("*.predictions.jsonl"))
    return [(a["id"], a["text"], a["finish_reason"], a["numeric"]) for a in map(json.loads, path.read_text().splitlines())]

def inferred(folder): return (folder / "answers.jsonl").read_text()

JOBS = {"train": (TRAIN, trained), "evaluate": (EVALUATE, answered), "infer": (INFER, inferred)}
jobs = pytest.mark.parametrize("job", JOBS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "What each command gives if nobody disturbs it"
    folder, found = fresh(tmp_path_factory.mktemp("undisturbed") / "it"), {}
    for job, (command, result) in JOBS.items():
        [(code, said)] = finish(start(command, folder), folder=folder)
        assert code == 0, said
        found[job] = result(folder)
    return found


def traces(folder):
    "How much of the work can be seen: lines that were logged or answered"
    kinds = ("runs/toy/*/log.jsonl", "eval_results/*.partial.jsonl", "*.partial.jsonl")
    return sum(p.read_bytes().count(b"\n") for kind in kinds for p in folder.glob(kind))


def kill(command, folder, draw):
    "Start the command and kill it so many lines and milliseconds later; False if it was ready first"
    process, goal, pause = start(command, folder), traces(folder) + draw.randrange(5), draw.uniform(0, 0.2)
    while process.is_alive() and traces(folder) < goal: time.sleep(0.002)
    time.sleep(pause)
    process.kill()
    process.join()
    return process.exitcode != 0


def go_on(job, folder, undisturbed):
    "The same command ends, and nothing is different"
    command, result = JOBS[job]
    [(code, said)] = finish(start(command, folder), folder=folder)
    assert code == 0, said
    assert result(folder) == undisturbed[job]


@pytest.mark.parametrize("job", ["train", "evaluate"])
def test_kills(job, undisturbed, tmp_path):
    draw, killed, ended = random.Random(20261126), 0, 0
    while killed < KILLS:
        folder = fresh(tmp_path / "it")
        while killed < KILLS and kill(JOBS[job][0], folder, draw): killed += 1
        go_on(job, folder, undisturbed)
        ended += 1
    assert ended > 1, "killed runs came to their end in between"


@pytest.mark.parametrize("job, size", [
    ("train", 0), ("train", 20_000), ("train", 300_000), ("evaluate", 1_500), ("evaluate", 20_000), ("infer", 1_500)])
def test_a_full_disk(job, size, undisturbed, tmp_path):
    "No file can grow beyond so many bytes, as if the disk were full; then there is room"
    folder = fresh(tmp_path / "it")
    [(code, said)] = finish(start(JOBS[job][0], folder, size), folder=folder)
    assert code == 1 and (not said or "the disk is full" in said and "Traceback" not in said), said # what is said is a file, too
    go_on(job, folder, undisturbed)


@contextlib.contextmanager
def read_only(folder):
    "Nobody can write there, not even root"
    if os.getuid():
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
        return
    made = subprocess.run(f"mount --bind '{folder}' '{folder}' && mount -o remount,bind,ro '{folder}'", shell=True, capture_output=True)
    if made.returncode: pytest.skip(f"root needs mount for that: {made.stderr.decode()}")
    try: yield
    finally: subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("job, where", [("train", "runs"), ("evaluate", "eval_results"), ("infer", ".")])
def test_a_folder_that_cannot_be_written(job, where, undisturbed, tmp_path):
    folder, command = fresh(tmp_path / "it"), JOBS[job][0]
    closed = tmp_path / "answers" if where == "." else folder / where
    closed.mkdir()
    if where == ".": command = [*command[:3], f"--output={closed}/answers.jsonl", *command[4:]]
    with read_only(closed): [(code, said)] = finish(start(command, folder), folder=folder)
    assert code == 1 and str(closed) in said and "Traceback" not in said and len(said.splitlines()) <= 2, said
    go_on(job, folder, undisturbed)


@jobs
def test_a_clock_that_went_back(job, undisturbed, tmp_path):
    "Every file of the killed command seems to come from next year"
    folder, draw = fresh(tmp_path / "it"), random.Random(1)
    while traces(folder) < 5: kill(JOBS[job][0], folder, draw)
    for path in folder.rglob("*"): os.utime(path, (time.time() + 3e7,) * 2)
    go_on(job, folder, undisturbed)


@jobs
def test_two_writers(job, undisturbed, tmp_path):
    "One does the work, the other says why it doesn't; or both, one after the other"
    folder = fresh(tmp_path / "it")
    both = finish(*[start(JOBS[job][0], folder) for _ in range(2)], folder=folder)
    assert 0 in [code for code, _ in both], both
    for code, said in both: assert code == 0 or code == 1 and "Traceback" not in said and len(said.splitlines()) <= 2, said
    assert JOBS[job][1](folder) == undisturbed[job]


def test_two_trainings_fill_one_cache(undisturbed, tmp_path):
    folder = fresh(tmp_path / "it")
    commands = [[*TRAIN[:-1], f"{TRAIN[-1]} run_name=lora-{name}"] for name in "ab"]
    both = finish(*[start(c, folder) for c in commands], folder=folder)
    assert [code for code, _ in both] == [0, 0], both
