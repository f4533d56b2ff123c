"""A small OpenAI-compatible server over a model given as a function: ``/v1/completions`` with ``n``, ``logprobs``,
``logit_bias``, temperature and seed, real HTTP on a port of its own. Prompts are token ids; tokens are named as vLLM
names them (``token_id:7``)."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


@dataclass
class CompletionsServer:
    """``silent_eos``: says nothing about an EOS that it drew, as some servers do."""

    next_logits: Callable[[Sequence[Sequence[int]]], torch.Tensor]
    eos: int
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    silent_eos: bool = False
    fail: int = 0

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(int(body.get("seed") or 0))
        choices = [self._choice(index, body, generator) for index in range(int(body.get("n", 1)))]
        return {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": body["model"], "choices": choices}

    def _choice(self, index: int, body: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        ids, names, chosen, top, reason = (
            list(body["prompt"]),
            list[str](),
            list[float](),
            list[dict[str, float]](),
            "length",
        )
        for _ in range(int(body["max_tokens"])):
            logits = self.next_logits([ids])[0].double()
            logprobs = torch.log_softmax(logits, -1)  # before bias and temperature, as vLLM has them
            for token, bias in (body.get("logit_bias") or {}).items():
                logits[int(token)] += bias
            heat = float(body.get("temperature", 1.0))
            law = (
                torch.softmax(logits / heat, -1) if heat else torch.nn.functional.one_hot(logits.argmax(), len(logits))
            )
            token = int(torch.multinomial(law.double(), 1, generator=generator))
            if token == self.eos and self.silent_eos:
                reason = "stop"
                break
            best = logprobs.topk(min(int(body.get("logprobs") or 0), len(logprobs)))
            names.append(f"token_id:{token}")
            chosen.append(float(logprobs[token]))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            top.append({f"token_id:{each}": value for each, value in pairs})
            ids.append(token)
            if token == self.eos:
                reason = "stop"
                break
        logprobs_field = {"tokens": names, "token_logprobs": chosen, "top_logprobs": top, "text_offset": []}
        return {"index": index, "text": "", "logprobs": logprobs_field, "finish_reason": reason}


@contextmanager
def serve(server: CompletionsServer) -> Iterator[CompletionsServer]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            server.bodies.append(body)
            known = self.path == "/v1/completions" and not server.fail
            status = 200 if known else server.fail or 404
            content = json.dumps(server.complete(body) if known else {"error": {"message": "no"}}).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
