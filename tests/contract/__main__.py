"""``make contract``: every request and question of the fixtures, sent to Prism, which serves the vendors' documents.

The same documents are checked in process by ``tests/conformance/test_vendor_specs.py``; Prism is a second reader that
shares no code with it. It needs node and npm, fetches Prism once into the cache, and binds to loopback only. Prints one
line per vendor; ends with 1 when Prism finds a violation, or misses the one that is planted.

Stripe's own simulator has no place here: no connector calls Stripe.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from tests.conformance.test_targets import fill, find_case, freeze, read_cases
from tests.conformance.test_vendor_specs import SPECS, VENDORS

PRISM = "@stoplight/prism-cli@5.16.0"
CACHE = Path.home() / ".cache" / "remitstream" / "contract"
SCHEMES = {"zoho_books": "Bearer token", "twilio_sms": "Basic dXNlcjpzZWNyZXQ="}
"""Prism takes the usual word of OAuth2 alone, not Zoho's own."""


def say(line):
    """One line, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def find_prism():
    """Prism's program, fetched when it is not there."""
    program = CACHE / "node_modules" / ".bin" / "prism"
    if not program.exists():
        for tool in ("node", "npm"):
            if shutil.which(tool) is None:
                sys.exit(f"make contract needs {tool}, which is not on this machine.")
        CACHE.mkdir(parents=True, exist_ok=True)
        say(f"fetching {PRISM} into {CACHE} ...")
        subprocess.run(
            [
                "npm",
                "install",
                "--no-audit",
                "--no-fund",
                "--ignore-scripts",
                "--silent",
                "--prefix",
                str(CACHE),
                PRISM,
            ],
            check=True,
            timeout=600,
        )
    return program


def correct_document(path, spurious):
    """The document without the members that it requires by its own mistake, as JSON."""
    text = path.read_text("utf-8")
    document = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    for schema in document["components"]["schemas"].values():
        if spurious and isinstance(schema.get("required"), list):
            schema["required"] = [name for name in schema["required"] if name not in spurious]
    return document


class Server:
    """Prism over one document, on a free port."""

    def __init__(self, program, document):
        self._folder = tempfile.TemporaryDirectory()
        file = Path(self._folder.name) / "document.json"
        file.write_text(json.dumps(document), "utf-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [str(program), "mock", "--host", "127.0.0.1", "--port", str(self.port), str(file)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self):
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                if time.monotonic() > until or self._process.poll() is not None:
                    self.__exit__()
                    sys.exit("Prism does not start.")
                time.sleep(0.1)
            else:
                return self

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait(30)
        self._folder.cleanup()

    def list_violations(self, method, path, headers, body):
        """What Prism has against a request; a refusal counts as one."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body or None, headers)
            response = connection.getresponse()
            response.read()
        finally:
            connection.close()
        named = json.loads(response.headers.get("sl-violations", "[]"))
        found = [one for one in named if one["location"][0] == "request"]
        return found if response.status < 400 else [*found, {"status": response.status}]


def list_calls(name):
    """Method, path, headers and body of every request and question of a target's fixtures."""
    calls = []
    for case in (case.values[1] for case in read_cases("requests") if case.values[0] == name):
        request, _ = freeze(name, case)
        calls.append((request.method, request.url, dict(request.headers), request.body))
    for case in (case.values[1] for case in read_cases("look_ups") if case.values[0] == name):
        request, _ = freeze(name, find_case(name, case["request"]))
        calls += [("GET", fill(page["url"], request), {"accept": "application/json"}, b"") for page in case["pages"]]
    return calls


def check_vendor(program, name):
    """Number of calls that Prism found nothing against, and what it found."""
    path, spurious = VENDORS[name]
    document = correct_document(path, spurious)
    base = urlsplit(document["servers"][0]["url"]).path
    problems = []
    with Server(program, document) as server:

        def ask(method, url, headers, body):
            parts = urlsplit(url)
            given = {**headers, "authorization": SCHEMES[name]}
            return server.list_violations(method, f"{parts.path.removeprefix(base)}?{parts.query}", given, body)

        calls = list_calls(name)
        for call in calls:
            problems += [(call[0], urlsplit(call[1]).path, one) for one in ask(*call)]
        method, url, headers, _ = calls[0]
        if not ask(method, url, headers, b"{}" if "json" in headers["content-type"] else b"Body=x"):
            problems.append(("planted", "", {"message": "a request without its members was taken"}))
    return len(calls), problems


def main():
    """Check every vendor whose document is here."""
    if not SPECS.is_dir():
        sys.exit("the vendors' documents are not here: REMITSTREAM_SHARED names the folder with their folder specs.")
    program = find_prism()
    failed = False
    for name in VENDORS:
        count, problems = check_vendor(program, name)
        say(f"{name}: {count} requests and questions, {len(problems)} violations")
        for method, path, problem in problems:
            say(f"  {method} {path}: {json.dumps(problem)}")
        failed = failed or bool(problems) or not count
    return int(failed)


if __name__ == "__main__":
    os.environ.setdefault("NO_PROXY", "127.0.0.1")
    sys.exit(main())
