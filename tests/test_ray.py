"Workers by Ray, on two nodes that this machine plays: nodes, drivers and jobs that die, memory, two studies at once"
import json
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
import psutil
import pytest
import yaml
from gsm8k_sft.core.config import ConfigError
from gsm8k_sft.experiments.runner import _Queue, do_jobs, main, run_study
from gsm8k_sft.experiments.study import Job, open_jobs, read_study

# Loopback, and a token that a node finds whatever its home, as the runner has them; read at the import of Ray.
os.environ |= {"RAY_AUTH_TOKEN": secrets.token_hex(), **os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
JOBS = [Job("toy", f"lora_main-s{i}", "lora", seed=i) for i in range(6)]
SMALL = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
TINY = """
preset: toy
overrides: [data.train_samples=24, data.test_samples=8, train.num_train_epochs=1, train.eval_steps=0, train.validation_samples=0,
            data.validation_fraction=0.1, evaluation.max_new_tokens=8]
methods: {full: {tuning: full, learning_rates: [1.0e-3]}}
runs: {full: {method: full, datasets: [socratic]}}
base: [{shots: [0]}]
"""


def place(monkeypatch, folder):
    for name in ("runs", "eval_results"): monkeypatch.setenv(f"GSM8K_SFT_PATHS_{name.upper()}", f"{folder}/{name}")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch): place(monkeypatch, tmp_path)


def add_node(cluster, **how):
    "Its raylet gives up after 15 s without a word from its agent, as on a busy machine: then another one, ten times at most"
    for last in [False] * 9 + [True]:
        try: return cluster.add_node(**SMALL, **how)
        except Exception as e:
            if last or "timed out" not in str(e): raise


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    "A head and a node, with room for one worker each; both know the token that the tests share"
    from ray.cluster_utils import Cluster
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "lighter"), os.environ.get("PYTHONPATH", "")]))
    (tmp_path / "lighter").mkdir()
    (tmp_path / "lighter" / "rfc3987_syntax.py").write_text("raise ImportError") # as the runner has it
    found = Cluster()
    for _ in range(2): add_node(found)
    [found.second] = found.worker_nodes
    yield found
    found.shutdown()


def work(folder, seconds=0.0, lock=False, **trouble):
    "For `do_jobs`: what has no end on disk is open; a job notes its process, gets into its trouble, and notes its end"
    def do(job):
        import os, signal
        from pathlib import Path
        begun, side_by_side = Path(folder) / f"{job.name}.begun", int(os.environ.get("GSM8K_SFT_WORKERS", 1))
        with open(begun, "a") as file: file.write(f"{os.getpid()} {side_by_side} {os.environ.get('OMP_NUM_THREADS')}\n")
        first, what = begun.read_text().count("\n") == 1, trouble.get(f"s{job.seed}")
        if what == "fails": raise ValueError("no such luck")
        if what == "memory" and side_by_side > 1: raise type("OutOfMemoryError", (MemoryError,), {})("too little")
        if what == "dies" and first: os.kill(os.getpid(), signal.SIGKILL)
        if lock:
            from gsm8k_sft.training.checkpoints import lock_run
            with lock_run(Path(folder) / job.name): return end(job)
        return end(job)
    def end(job):
        done = Path(folder) / f"{job.name}.done"
        if done.exists(): return "done before, and reused"
        time.sleep(seconds)
        with open(done, "a") as file: file.write(f"{job.seed ** 2}\n")
        return f"test {job.seed}.0 % strict"
    Path(folder).mkdir(exist_ok=True)
    return lambda: ([j for j in JOBS if not (Path(folder) / f"{j.name}.done").exists()], 0), do


def ends(folder, *but): # what the jobs of `work` have left
    return {p.stem: p.read_text() for p in Path(folder).glob("*.done") if p.stem[-1] not in but}


def processes(folder): return {p.stem: [line.split() for line in p.read_text().splitlines()] for p in Path(folder).glob("*.begun")}


def once(folder, *but): return ends(folder, *but) == {j.name: f"{j.seed ** 2}\n" for j in JOBS if str(j.seed) not in but}


def test_a_job_that_fails_one_that_dies_and_one_short_of_memory(tmp_path, monkeypatch):
    "The quick one: a Ray of our own. Each job is done once, as without Ray; it listens on loopback only; workers are warm"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (todo, do), said, ports = work(tmp_path / "a", s1="memory", s2="fails", s3="dies"), [], set()
    def say(line):
        said.append(line)
        children = psutil.Process().children(recursive=True)
        ports.update(c.laddr.ip for p in children if p.is_running() for c in p.net_connections("inet") if c.status == "LISTEN")
    found = do_jobs(todo, do, workers=2, say=say)
    assert once(tmp_path / "a", "2") and (found["done"], found["left"], found["waiting"]) == (5, [], 0)
    assert list(found["failed"].values()) == ["ValueError: no such luck"]
    assert ports and ports <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    begun = processes(tmp_path / "a")
    cores = os.cpu_count() or 1
    expected = [["2", str(max(1, cores // 2))], ["1", str(cores)]]
    assert [numbers for _, *numbers in begun["lora_main-s1"]] == expected, "it had the machine and its cores to itself the second time"
    assert len(begun["lora_main-s3"]) == 2 and sum(map(len, begun.values())) == 8
    assert len({pid for lines in begun.values() for pid, *_ in lines}) < 8, "warm"
    assert len(said) == 8 and all("put back" in s for s in said if "died" in s or "Memory" in s)
    assert said[-1].endswith("5 done, 0 running, 0 open, 0 waiting, best 5.0 % (lora_main-s5), 0 min left")
    todo, do = work(tmp_path / "b", s2="fails")
    assert do_jobs(todo, do)["done"] == 5 and ends(tmp_path / "b") == ends(tmp_path / "a"), "and without Ray"


def test_where_the_jobs_stand(tmp_path):
    "What another process did while it ran here is not counted twice; with one worker there is no larger share to put a job back with"
    queue = _Queue(lambda: (JOBS[:2], 0), say=lambda line: None)
    [job, other] = [job for job, _ in queue.open()]
    queue.running += [job, other]
    queue.todo = lambda: ([], 0)
    assert not queue.open() and queue.state().startswith("0 done, 2 running, 0 open")
    assert queue.report(job, "failed", "OutOfMemoryError: too little") == "short" and queue.outcomes[job][0] == "failed"
    shared = _Queue(lambda: (JOBS[:1], 0), say=lambda line: None, share=0.5)
    shared.running += [job for job, _ in shared.open()]
    shared.report(JOBS[0], "failed", "OutOfMemoryError: too little")
    assert shared.open() == [(JOBS[0], 1)]
    for outcome in ["lost", "unbegun", "lost", "unbegun", "unbegun"]:
        shared.running.append(JOBS[0])
        shared.report(JOBS[0], outcome, "")
        assert [job for job, _ in shared.open()] == JOBS[:1], "a node's death costs no try"


LATE = """
import os, time
words = open("/proc/self/cmdline").read().split("\\0")
if any(w.endswith("dashboard/agent.py") for w in words[1:4]):
    try: os.close(os.open({mark!r}, os.O_CREAT | os.O_EXCL))
    except FileExistsError: pass
    else: time.sleep(20)
"""


@pytest.mark.slow
def test_ray_that_does_not_start_at_first_is_started_again(tmp_path, monkeypatch):
    "As on a busy machine, where the agent of Ray's node is later than the 15 s that the node waits"
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "sitecustomize.py").write_text(LATE.format(mark=str(tmp_path / "mark")))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "late"), os.environ.get("PYTHONPATH", "")]))
    said = []
    assert do_jobs(*work(tmp_path / "a"), workers=2, say=said.append)["done"] == 6 and once(tmp_path / "a")
    assert "trying again" in said[0] and (tmp_path / "mark").exists()


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"workers": -2}, {"minutes": -1}, {"minutes": float("nan")}])
def test_what_cannot_be_is_refused_before_anything_runs(tmp_path, wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}.* at least"): do_jobs(*work(tmp_path), **wrong)
    assert not ends(tmp_path)
    with pytest.raises(SystemExit): main("gemma-3-270m", how="twice")


def test_without_ray_several_workers_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None) # as if it were not installed
    with pytest.raises(ConfigError, match=r"gsm8k_sft\[cluster\]"): do_jobs(*work(tmp_path / "a"), workers=2)
    assert do_jobs(*work(tmp_path / "a"))["done"] == 6


def test_a_cluster_that_listens_elsewhere_than_ray_looks_for_it(tmp_path, monkeypatch):
    "Ray takes 127.0.0.1 for this machine's own address, and would look there for minutes"
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.2")
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(ConfigError, match="for Ray 127.0.0.2: "):
        do_jobs(*work(tmp_path), address=f"127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:many", "no.such.host.invalid:6379"])
def test_a_cluster_that_is_not_there_is_said(tmp_path, address):
    with pytest.raises(ConfigError, match=f"no Ray cluster answers at {address}, "): do_jobs(*work(tmp_path), address=address)


@pytest.mark.parametrize("name", ["aws.yaml", "slurm.sh"])
def test_the_cluster_files(name):
    "Their shell is well formed, `ray start` takes what it is given on a head and on a node, and Ray's schema allows the rest"
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.scripts.scripts import start
    text = (Path(__file__).parents[1] / "cluster" / name).read_text()
    if name == "aws.yaml":
        config = yaml.safe_load(text)
        validate_config(prepare_config(config))
        text = "\n".join(line for key, lines in config.items() if key.endswith("_commands") for line in lines)
    assert not subprocess.run(["bash", "-n"], input=text, text=True).returncode and "RAY_AUTH_MODE=token" in text
    known = re.sub(r"\$\w+|\${[^}]+}", "1", text)
    head, node = (start.make_context("start", shlex.split(words)).params for words in re.findall(r"ray start ([^&\n]+)", known))
    assert head["head"] and head["include_dashboard"] is False and not head["address"]
    assert node["address"] and not node["head"] and node["include_dashboard"] is None, "a node refuses the head's option"


@pytest.mark.slow
def test_a_node_is_killed_in_the_middle(tmp_path, cluster):
    (todo, do), said = work(tmp_path / "a", seconds=8), []
    def say(line):
        said.append(line)
        if cluster.second in cluster.worker_nodes and line.endswith("min left"): cluster.remove_node(cluster.second, allow_graceful=False)
    found = do_jobs(todo, do, address=cluster.address, say=say)
    assert once(tmp_path / "a") and found["done"] == 6 and not found["failed"]
    assert sum("its process died" in line for line in said) <= 1, "that Ray starts another on the dead node isn't the job's fault"


DRIVER = """
import sys
sys.path.insert(0, {tests!r})
from test_ray import do_jobs, work
print(do_jobs(*work({folder!r}, seconds=1.5, lock=True), address={address!r})["left"])
"""


@pytest.mark.slow
def test_the_driver_is_killed_and_two_go_on(tmp_path, cluster):
    "The two have the same jobs: what one is doing isn't done by the other"
    text = DRIVER.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "a"), address=cluster.address)
    def start(): return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    def stop(driver, number):
        while not ends(tmp_path / "a") and driver.poll() is None: time.sleep(0.1)
        driver.send_signal(number)
        return driver.wait(timeout=120)
    assert stop(start(), signal.SIGTERM) == -signal.SIGINT, "as Ctrl-C; Ray's own handler would abort"
    stop(start(), signal.SIGKILL)
    both = [start(), start()]
    assert [p.communicate(timeout=300)[0].split()[-1] for p in both] == ["[]", "[]"] and once(tmp_path / "a")
    assert not [p for p in both if p.returncode]


def results(folder): # answers and losses, without what time and place change
    files = {p.name: map(json.loads, p.read_text().splitlines()) for p in Path(folder).glob("eval_results/*.predictions.jsonl")}
    answers = {name: [(row["id"], row["text"], row["strict"]) for row in rows] for name, rows in files.items()}
    runs = {p.parent.name: p.read_text().splitlines() for p in Path(folder).glob("runs/toy/*/log.jsonl")}
    logs = {run: [json.loads(line).get("loss") for line in lines] for run, lines in runs.items()}
    return answers, logs


@pytest.mark.slow
def test_results_equal_those_without_ray_and_other_disks_are_refused(tmp_path, cluster, monkeypatch):
    "At last the second node has a home of its own, and with it other folders"
    (tmp_path / "tiny.yaml").write_text(TINY)
    tiny = read_study(str(tmp_path / "tiny.yaml"))
    place(monkeypatch, tmp_path / "plain")
    assert run_study(tiny)["done"] == 3
    place(monkeypatch, tmp_path / "ray")
    assert run_study(tiny, address=cluster.address)["done"] == 3 and open_jobs(tiny) == ([], 0)
    assert results(tmp_path / "ray") == results(tmp_path / "plain")
    place(monkeypatch, "~")
    cluster.remove_node(cluster.second)
    add_node(cluster, env_vars={"HOME": str(tmp_path / "there")})
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    failed = do_jobs(*work(tmp_path / "a"), address=cluster.address)["failed"]
    assert failed and all("shared folder" in why for why in failed.values())
