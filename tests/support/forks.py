"""A process that has imported the package once and runs each command in a fork of itself.

Importing torch takes seconds, and the documentation has many commands. `Forks` starts the process
and makes an executable named `megarecur`, which hands it its arguments, folder, environment and
streams.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

CLIENT = """\
#!{python} -IS
import json, os, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({path!r})
request = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(link, [len(request).to_bytes(8, "big")], [0, 1, 2])
link.sendall(request)
sys.exit(int(link.recv(8) or b"1"))
"""


class Forks:
    """The process, and the folder with its client `megarecur`.

    Args:
        folder: where the socket and the client are made.
        prepare: Python source that the process executes after it has imported the package.
    """

    def __init__(self, folder: Path, prepare: str = "") -> None:
        path = folder / "socket"
        self.folder = folder
        client = folder / "megarecur"
        client.write_text(CLIENT.format(python=sys.executable, path=str(path)), encoding="utf-8")
        client.chmod(0o755)
        self.process = subprocess.Popen([sys.executable, "-P", __file__, str(path), prepare])
        while not path.exists():
            assert self.process.poll() is None, "the process to fork has ended"
            time.sleep(0.05)

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait()


def serve(path: str, prepare: str) -> None:
    """Import what commands need, and run each request in a fork."""
    import streaming  # noqa: F401
    import torch
    import typer.main

    import megarecur.convert.hf
    import megarecur.inference.generate
    import megarecur.launch.cli
    import megarecur.train.trainer

    typer.main.get_command = cache(typer.main.get_command)
    typer.main.get_command(megarecur.launch.cli.app)  # Forks inherit the tree of commands.
    exec(prepare, {})
    torch.set_num_threads(1)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path + ".new")
    server.listen()
    os.rename(path + ".new", path)
    while True:
        link, _ = server.accept()
        if os.fork() == 0:
            server.close()
            link.sendall(str(answer(link)).encode())
            os._exit(0)
        link.close()
        with suppress(ChildProcessError):  # Every fork has ended, this one too.
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass


def answer(link: socket.socket) -> int:
    """Run the command of a request with its streams; returns its exit code."""
    from megarecur.launch.cli import main

    head, fds, _, _ = socket.recv_fds(link, 8, 3)
    request = b""
    while len(request) < int.from_bytes(head, "big"):
        request += link.recv(1 << 16)
    argv, folder, environment = json.loads(request)
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    code: object = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    serve(*sys.argv[1:])
