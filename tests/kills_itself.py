"""A worker process that dies at its work; a module of its own, which takes no time to import."""

import os
import signal


class KillsItself:
    def __call__(self, data, rank, world_size):
        os.kill(os.getpid(), signal.SIGKILL)
