"""An OpenAI-compatible server for tests, which misbehaves as it is told to."""

import json
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """An OpenAI-compatible server on loopback that does to each request what the next entry of `script` says, then "ok".

    answer: a text, or a function of the request's body that returns one, or a dict of the answer's text and finish_reason, or
    of another status and body.
    """

    def __init__(self, script=(), answer="The first. Verdict: 1"):
        self.script, self.answer, self.seen, self.headers = list(script), answer, [], []
        self.now = self.most = 0
        self.lock = lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                with lock:
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                    what = outer.script.pop(0) if outer.script else "ok"
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.seen.append((what, self.path, body))
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                try:
                    outer.behave(self, what, body)
                except (BrokenPipeError, ConnectionResetError):
                    pass

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def leave(self):
        """One request fewer is under way: before its answer is sent, after which the client's next one may be here at once."""
        with self.lock:
            self.now -= 1

    def behave(self, request, what, body):
        said = self.answer(body) if callable(self.answer) else self.answer
        said = {"text": said} if isinstance(said, str) else said
        text = None if what == "empty" else said.get("text")
        choice = {"index": 0, "finish_reason": said.get("finish_reason", "stop"),
                  "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15}
        good = json.dumps(said.get("body", {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                                            "choices": [choice], "usage": usage})).encode()
        status, length, headers = said.get("status", 200), None, {}
        if isinstance(what, int):
            status, good = what, json.dumps({"error": {"message": f"trouble {what} {request.headers['Authorization']}"}}).encode()
        elif what == "wait":
            status, good, headers = 429, b"{}", {"Retry-After": "0.3"}
        elif what == "slow":  # the client gives it up
            self.leave()
            time.sleep(2.5)
        elif what == "malformed":
            good = b"<html>gateway</html>"
        elif what == "no choices":
            good = b'{"choices": []}'
        elif what == "truncated":
            length, good = len(good), good[:40]
        if what != "slow":
            self.leave()
        if what == "reset":  # a closed connection with unread data and no lingering: RST
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()
            return
        request.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(length or len(good)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(good)
