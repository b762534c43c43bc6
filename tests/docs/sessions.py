"""Runs the programs of documents as a reader would: in order, one shell and one Python session for each document."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from examples.local_service import reserved_port
from tests.docs.markdown import ROOT, Block, Text, commands_of, first_broken_promise, unmarked

SERVE = "ferryman-service serve"
"""The command that the README starts the service with, in a terminal of its own."""

LIMIT_S = 1200.0
"""No command of a document takes so long on any machine: past it, it hangs."""

_PORT = "50051"
_STATUS = re.compile(r"\n?<<status (\d+)>>\n")
_DRIVER = """
import contextlib, io, json, sys, traceback
names = {"__name__": "__main__"}
for request in sys.stdin:
    block = json.loads(request)
    output, error = io.StringIO(), ""
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            exec(compile(block["text"], block["document"], "exec"), names)
        except BaseException:
            error = traceback.format_exc()
    print(json.dumps({"output": output.getvalue(), "error": error}), flush=True)
"""


class BrokenDocument(AssertionError):
    """A program fails, or does not print what its document promises. The message begins with file:line."""


class DocumentedService:
    """The service as the README starts it, in a copy of the clone; only the ports are others."""

    def __init__(self, clone: Path, port: int):
        self.clone = clone
        self.port = str(port)
        for name in ("README.md", "bench", "client", "deploy", "docs", "examples", "protos", "service"):
            (clone / name).symlink_to(ROOT / name)
        (clone / ".venv").symlink_to(Path(sys.prefix))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FERRYMAN_")},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FERRYMAN_SERVER": f"localhost:{port}",
            "FERRYMAN_PORT": self.port,
            "FERRYMAN_PROBE_PORT": "0",
            "FERRYMAN_METRICS_PORT": "0",
        }
        self._log = clone / "service.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                SERVE.split(), cwd=clone, env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )

    def wait_until_serving(self) -> None:
        deadline_s = time.monotonic() + LIMIT_S
        while f"serving on 127.0.0.1:{self.port}\n" not in self.printed():
            assert self._process.poll() is None and time.monotonic() < deadline_s, self.printed()
            time.sleep(0.05)

    def printed(self) -> str:
        """Return what it has printed so far, but its log lines of calls."""
        text = self._log.read_text(encoding="utf-8", errors="replace")
        return "".join(line for line in text.splitlines(keepends=True) if "call_scope:" not in line)

    def with_its_address(self, text: str) -> str:
        """Return the text with its port, and its address in the place of machines that only the documents have."""
        text = re.sub(r"\b10\.0\.0\.\d+:50051\b", f"127.0.0.1:{self.port}", text)
        return re.sub(rf"\b(localhost|127\.0\.0\.1):{_PORT}\b", rf"\1:{self.port}", text)

    def with_the_documents_port(self, printed: str) -> str:
        """Return the output with the port that the documents name."""
        return re.sub(rf":{self.port}\b", f":{_PORT}", printed)

    def stop(self) -> int:
        self._process.terminate()
        try:
            return self._process.wait(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise


@contextmanager
def documented_service(clone: Path) -> Iterator[DocumentedService]:
    """Run the service for the length of the block."""
    clone.mkdir()
    with reserved_port() as port:
        service = DocumentedService(clone, port)
        try:
            service.wait_until_serving()
            yield service
        finally:
            status = service.stop()
    assert status == 0, service.printed()


class _Program:
    """A child that takes a request and answers it; a child that hangs is ended."""

    def __init__(self, command: list[str], service: DocumentedService):
        self._child = subprocess.Popen(
            command,
            cwd=service.clone,
            env=service.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )

    def ask(self, request: str, answer_ends: re.Pattern[str]) -> str:
        """Return what the child prints up to a line that matches, or until it ends."""
        assert self._child.stdin is not None and self._child.stdout is not None
        watch = threading.Timer(LIMIT_S, self._child.kill)
        watch.start()
        answer = ""
        try:
            with suppress(BrokenPipeError):  # it has ended, so that there is nothing to read
                self._child.stdin.write(request)
                self._child.stdin.flush()
            for line in self._child.stdout:
                answer += line
                if answer_ends.search(line):
                    break
        finally:
            watch.cancel()
        return answer

    def close(self) -> None:
        self._child.kill()
        self._child.communicate()


class Shell(_Program):
    """One bash: variables, functions and the working folder stay from block to block."""

    def __init__(self, service: DocumentedService):
        super().__init__(["bash", "-o", "pipefail"], service)
        self._script = service.clone / "block.sh"

    def run(self, script: str, *, strict: bool = False) -> tuple[str, int]:
        """Return what the script prints and its exit status; `strict` ends it at the first command that fails."""
        self._script.write_text(f"set -e\n{script}\nset +e\n" if strict else script)
        script_path = shlex.quote(str(self._script))
        answer = self.ask(f"source {script_path} </dev/null; printf '\\n<<status %d>>\\n' $?\n", _STATUS)
        found = _STATUS.search(answer)
        return answer[: found.start()] if found else answer, int(found[1]) if found else 1


class Python(_Program):
    """One interpreter: names stay from block to block."""

    def __init__(self, service: DocumentedService):
        super().__init__([sys.executable, "-c", _DRIVER], service)

    def run(self, block: Block, text: str) -> tuple[str, str]:
        """Return what the block prints, and its traceback or nothing."""
        text = "\n" * (block.line - 1) + text  # tracebacks name the lines of the document
        request = json.dumps({"text": text, "document": str(ROOT / block.document)})
        answer = self.ask(f"{request}\n", re.compile(r"^\{"))
        if not answer.splitlines() or not answer.splitlines()[-1].startswith("{"):
            return "", f"the interpreter has ended: {answer}\n"
        reply = json.loads(answer.splitlines()[-1])  # libraries in C may have written before it
        return reply["output"], reply["error"]


class Session:
    """The session of one document."""

    def __init__(self, service: DocumentedService):
        self._service = service
        self._shell = Shell(service)
        self._python = Python(service)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._shell.close()
        self._python.close()

    def run(self, block: Block) -> None:
        """Run a block. Raises BrokenDocument."""
        {"console": self._console, "shell": self._script, "python": self._program}[block.language](block)

    def _console(self, block: Block) -> None:
        for command in commands_of(block):
            place = f"{block.document}:{command.line}"
            if command.text == SERVE:
                self._check(block.document, command.promised, self._service.printed())
                continue
            printed, status = self._shell.run(self._service.with_its_address(command.text))
            fails = any(line.startswith("Error: ") for line in command.promised.lines)
            if (status != 0) != fails:
                raise BrokenDocument(f"{place}: exit status {status}; it printed\n{printed}")
            if command.promised.lines:
                self._check(block.document, command.promised, printed)

    def _script(self, block: Block) -> None:
        printed, status = self._shell.run(self._service.with_its_address(block.text), strict=True)
        if status:
            raise BrokenDocument(f"{block.place}: exit status {status}; it printed\n{printed}")
        if block.promised is not None:
            self._check(block.document, block.promised, printed)

    def _program(self, block: Block) -> None:
        printed, error = self._python.run(block, self._service.with_its_address(block.text))
        if error:
            raise BrokenDocument(f"{block.place}: {error}after it printed\n{printed}")
        if block.promised is not None:
            self._check(block.document, block.promised, printed)

    def _check(self, document: str, promised: Text, printed: str) -> None:
        printed = self._service.with_the_documents_port(printed)
        line = first_broken_promise(promised, printed)
        if line is not None:
            wanted = "\n".join(promised.lines)
            raise BrokenDocument(
                f"{document}:{line}: the document promises\n{wanted}\nbut the program prints\n{printed}"
            )


def run_document(document: str, service: DocumentedService) -> None:
    """Run the programs of a document that have no mark. Raises BrokenDocument, which names all that fail."""
    broken = []
    with Session(service) as session:
        for block in unmarked(document):
            try:
                session.run(block)
            except BrokenDocument as error:
                broken.append(str(error))
    if broken:
        raise BrokenDocument("\n\n".join(broken))
