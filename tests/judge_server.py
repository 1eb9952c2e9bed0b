"""An HTTP server that answers as an OpenAI-compatible endpoint does, well or badly, by script."""

import json
import socket
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "toy-judge"


class JudgeServer:
    """Serves on a free local port while used as a context manager.

    Attributes:
        script: actions by the user message's first word, one for each time it is asked, then ``ok``. Actions: ok,
            sleep, drip, cut, reset, down (no connection is taken from then on), truncated, html, no-choices, empty,
            wrong-model, new-field, or an HTTP status.
        fails_after, failure: this many requests are answered by the script, all later ones by this action.
        asked: number of requests by first word.
        most_at_once: requests in flight at the same time, at the most.
    """

    def __init__(self, script=None, answer="Rating: [[7]]", delay_s=0.0, fails_after=None, failure="reset"):
        self.script, self.answer, self.delay_s = dict(script or {}), answer, delay_s
        self.fails_after, self.failure = fails_after, failure
        self.asked, self.bodies, self.times = defaultdict(int), [], defaultdict(list)
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()

    def __enter__(self):
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                owner.respond(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def respond(self, handler, body):
        word = body["messages"][-1]["content"].split()[0]
        with self._lock:
            turn = self.asked[word]
            self.asked[word] += 1
            self.bodies.append(body)
            number = len(self.bodies)
            self.times[word].append(time.monotonic())
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            time.sleep(self.delay_s)
            actions = self.script.get(word, [])
            action = actions[turn] if turn < len(actions) else "ok"
            failing = self.fails_after is not None and number > self.fails_after
            self._act(handler, body, self.failure if failing else action)
        except OSError:  # the client hung up
            pass
        finally:
            with self._lock:
                self._at_once -= 1

    def _act(self, handler, body, action):
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": self.answer}}
        if body.get("logprobs"):
            top = [{"token": token, "logprob": value} for token, value in {"m": -0.2, "M": -1.7, "The": -4.0}.items()]
            choice["logprobs"] = {"content": [{"token": "m", "logprob": -0.2, "top_logprobs": top}]}
        reply = {"id": "1", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice]}
        reply["usage"] = {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
        if action == "sleep":
            time.sleep(4)
        elif action == "empty":
            choice["message"]["content"] = "  "
        elif action == "wrong-model":
            reply["model"] = "another-judge"
        elif action == "no-choices":
            reply["choices"] = []
        content = json.dumps(reply).encode()
        if action == "new-field" and "max_tokens" in body:
            error = {"error": {"message": "'max_tokens' is not supported, use 'max_completion_tokens'", "code": None}}
            return self._send(handler, json.dumps(error).encode(), status=400)
        if isinstance(action, int):
            error = {"error": {"message": f"scripted {action}", "code": None}}
            headers = {"Retry-After": "0.3"} if action == 429 else {}
            return self._send(handler, json.dumps(error).encode(), status=action, headers=headers)
        if action == "down":
            self.server.socket.close()
        if action in ("reset", "down"):
            return self._hang_up(handler)
        if action == "truncated":
            return self._send(handler, content[: len(content) // 2])
        if action == "html":
            return self._send(handler, b"<html>busy</html>", kind="text/html")
        if action == "cut":
            self._head(handler, len(content), 200, "application/json", {})
            handler.wfile.write(content[: len(content) // 2])
            handler.wfile.flush()
            return self._hang_up(handler)
        if action == "drip":
            self._head(handler, len(content), 200, "application/json", {})
            for byte in content:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                time.sleep(0.05)
            return None
        return self._send(handler, content)

    def _hang_up(self, handler):
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)

    def _head(self, handler, length, status, kind, headers):
        handler.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(length), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()

    def _send(self, handler, content, status=200, kind="application/json", headers=None):
        self._head(handler, len(content), status, kind, headers or {})
        handler.wfile.write(content)
