"""A registry that answers badly is one that does not answer: it is waited for, and nobody reads a stack trace."""

import socketserver
import threading

import pytest

from topics.registry import Registry, RegistrySettings, RegistryUnreachable

ANSWERS = {
    "cut": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",
    "garbage": b"\x16\x03\x01\x02\x00\r\n\r\n",
    "nothing": b"",
    "no JSON": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n<>",
    "other JSON": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
    "empty JSON": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    "busy": b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
}


@pytest.fixture
def registry(request):
    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(65536)
            self.request.sendall(ANSWERS[request.param])

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Registry(RegistrySettings(url=f"http://127.0.0.1:{server.server_address[1]}"))
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("registry", ANSWERS, indirect=True)
@pytest.mark.parametrize(
    "ask",
    [lambda r: r.find_schema(1), lambda r: r.find_id("s", "{}"), lambda r: r.check("s", "{}")],
    ids=["find_schema", "find_id", "check"],
)
def test_a_bad_answer_is_none(registry, ask):
    with pytest.raises(RegistryUnreachable) as error:
        ask(registry)
    assert error.value.code == "RS212"
    assert "127.0.0.1" in error.value.place
