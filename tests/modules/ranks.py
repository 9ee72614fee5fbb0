"""core-seg on two processes, with what torchrun would tell them; forked from the test, which saves their imports."""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

from apps.cli import main

TWO = ("--trainer.devices=2", "--trainer.accelerator=cpu")


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


class Ranks:
    """core-seg in two processes with the environment that torchrun gives them; forked, which saves the imports."""

    def __init__(self, arguments: list[str]) -> None:
        world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        fork = multiprocessing.get_context("fork")
        self.printed = [Path(f"printed_{rank}.txt").resolve() for rank in range(2)]
        self.processes = [
            fork.Process(target=self.run, args=(arguments, world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
            for rank in range(2)
        ]
        for process in self.processes:
            process.start()

    def run(self, arguments: list[str], environment: dict[str, str]) -> None:
        os.environ.update(environment)
        with self.printed[int(environment["RANK"])].open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)
        faulthandler.enable(2)
        sys.exit(main(arguments))

    def wait(self, seconds: float = 120) -> tuple[list[int], list[str]]:
        """Exit codes and what was printed, by rank; processes that hang are ended with their stacks printed."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGABRT)
            process.join()
        return [process.exitcode for process in self.processes], [path.read_text() for path in self.printed]

    def finish(self) -> list[str]:
        """What was printed, by rank, of a run that is to go well."""
        codes, printed = self.wait()
        assert codes == [0, 0], "\n".join(printed)
        return printed
