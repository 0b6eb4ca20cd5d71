"""A local web server with scripted answers."""

import http.server
import threading
from contextlib import contextmanager, suppress


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends the next scripted answer (status, announced length, body) of a path; repeats the last one."""

    def do_GET(self):
        name = self.path.partition("?")[0].lstrip("/")
        self.server.requests.append(name)
        status, length, body = self._answer(name)
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        with suppress(OSError):  # the client has disconnected
            self.wfile.write(body)

    def _answer(self, name):
        answers = self.server.answers.get(name)
        if answers:
            return answers.pop(0) if len(answers) > 1 else answers[0]
        path = self.server.folder and self.server.folder / name
        if path and path.is_file():
            return (200, path.stat().st_size, path.read_bytes())
        return (404, 0, b"")

    def log_message(self, *_):
        pass


@contextmanager
def serving(folder=None):
    """Serve the files of a folder, and `answers` where there are some; `requests` are the names asked for."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answers, server.requests, server.folder = {}, [], folder
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
