"`python -m gsm8k_sft...` in a process of its own, forked from one that has imported the libraries: a start takes no time"
import multiprocessing, os, runpy, signal, sys, warnings

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["gsm8k_sft.train", "gsm8k_sft.infer"])


def run(module, words, folder, environ, said):
    "What the process does; what it says goes to the file `said`"
    file = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2): os.dup2(file, stream)
    os.chdir(folder)
    os.environ.clear(), os.environ.update(environ)
    signal.signal(signal.SIGINT, signal.default_int_handler) # ignored where the tests run in the background of a shell
    warnings.filterwarnings("ignore", "'gsm8k_sft.* found in sys.modules") # it was imported before it is run
    sys.argv = [module, *map(str, words)]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def finish(process, seconds=300):
    "Its exit code and what it said, when it has ended"
    process.join(seconds)
    assert process.exitcode is not None, f"still at work after {seconds} s: {process.said.read_text()}"
    return process.exitcode, process.said.read_text()
