"""Starts a script in processes of its own, as a user or torchrun does. They are forks of one that has imported torch,
which saves eight seconds each."""

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "datasets", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor", "transformers",
    "transformers.models.llama.modeling_llama", "transformers.generation", "torch._dynamo"])


def run(words, environment, cwd, log):
    """What a process does. Its output goes to a file."""
    with open(log, "a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    try:
        runpy.run_path(words[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())  # as Python does; a fork would not
        sys.exit(1)
    atexit._run_exitfuncs()  # a fork skips these


class Launch:
    """The processes of a script with its flags, one for each rank. `log` is a file with what they print."""

    def __init__(self, words, ranks):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        self.log = tempfile.NamedTemporaryFile(prefix="rm-launch-")
        self.processes = []
        for rank in range(ranks):
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                           "MASTER_ADDR": "localhost", "MASTER_PORT": port} if ranks > 1 else {}
            process = FORKS.Process(target=run, args=(words, environment, os.getcwd(), self.log.name))
            process.start()
            self.processes.append(process)

    def is_running(self):
        return all(process.is_alive() for process in self.processes)

    def kill(self):
        """kill -9"""
        for process in self.processes:
            os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def finish(self):
        """Wait for all processes; an error in one of them is an error here."""
        for process in self.processes:
            process.join()
        assert [process.exitcode for process in self.processes] == [0] * len(self.processes), self.output()

    def output(self):
        return Path(self.log.name).read_text()
