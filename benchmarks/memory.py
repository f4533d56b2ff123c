"""Mixed load for ten minutes: is memory flat, is the pool accounted for to the block, is every answer right?

    python benchmarks/memory.py --minutes 10 --report reports/engine.json

Callers of four kinds at once against ``lenvm serve`` with a small pool, which is full before long: predictions (some
with a common beginning, some rows bad), sessions that grow, guided steps of several rows with promotion, and callers
who hang up. *Memory*: the slope of resident memory, and of the device's, over the last two thirds. *Pool*: at the end
prompts that need the whole pool are sent: then the blocks in use are theirs and not one more, or one has leaked.
*Answers*: a sample of all answers is compared with a forward of the whole text in float32 in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import torch
from _engine import merge
from _load import Replica, slope_per_minute

from lenvm.export.parity import TORCH_LIMITS
from lenvm.modeling import LengthValueModel
from lenvm.returns import value_from_logit
from lenvm.scoring import ScoreRow, TorchScorer

BLOCK = 32  # tokens, of the service's pool
KEPT = 2000  # answers to be checked, at most
_FAMILIES = 12  # common beginnings


class Load:
    """The callers, and what they have seen."""

    def __init__(self, url: str, seed: int, vocabulary: int, longest: int) -> None:
        self.url, self.dice, self.vocabulary, self.longest = url, random.Random(seed), vocabulary, longest
        self.client = httpx2.AsyncClient(base_url=url, timeout=600)
        self.beginnings = [self.ids(longest // 2) for _ in range(_FAMILIES)]
        self.seen: Counter[str] = Counter()
        self.kept: list[tuple[list[int], float]] = []  # a whole text, and the value at its end that was answered
        self.answers = 0
        self.end = 0.0

    def ids(self, count: int) -> list[int]:
        """Random tokens, no special ones."""
        return [self.dice.randrange(20, self.vocabulary) for _ in range(count)]

    def prompt(self) -> list[int]:
        """Some begin alike."""
        own = self.ids(self.dice.randint(1, self.longest // 2))
        return self.dice.choice(self.beginnings) + own if self.dice.random() < 0.5 else own

    def keep(self, ids: list[int], value: float) -> None:
        """A sample of all answers, each as likely as the others."""
        self.answers += 1
        if len(self.kept) < KEPT:
            self.kept.append((ids, value))
        elif (at := self.dice.randrange(self.answers)) < KEPT:
            self.kept[at] = ids, value

    async def ask(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]] | None:
        """The rows of an answer."""
        answer = await self.client.post(path, json=body)
        self.seen[f"{path} {answer.status_code}"] += 1
        if answer.status_code != 200:
            return None
        found = answer.json()
        rows: list[dict[str, Any]] = found.get("predictions") or found["scores"]
        return rows

    async def predict(self) -> None:
        """A few prompts, a bad one among them now and then."""
        prompts = [self.prompt() for _ in range(self.dice.randint(1, 4))]
        inputs: list[dict[str, Any]] = [{"token_ids": ids} for ids in prompts]
        if self.dice.random() < 0.2:
            inputs.append({"token_ids": [self.vocabulary + 1]})
        rows = await self.ask("/predict_length", {"inputs": inputs})
        for ids, row in zip(prompts, rows or [], strict=False):
            self.row(ids, row)
        if rows and len(rows) > len(prompts) and "error" not in rows[-1]:
            self.seen["a bad row was answered"] += 1

    def row(self, ids: list[int], row: dict[str, Any]) -> bool:
        """An answer or a typed error of a row."""
        if "error" in row:
            self.seen[f"row {row['error']['type']}"] += 1
            return False
        self.keep(ids, row["value"])
        return True

    async def session(self) -> None:
        """A text that grows by a few tokens a call."""
        ids = self.prompt()
        body: dict[str, Any] = {"inputs": [{"token_ids": ids}]}
        for _ in range(self.dice.randint(2, 16)):
            rows = await self.ask("/predict_length", body)
            if not rows or not self.row(ids, rows[0]):
                return  # let go meanwhile
            more = self.ids(self.dice.randint(1, 3))
            ids = ids + more
            body = {"inputs": [{"session": rows[0]["session"], "append": more}]}

    async def steps(self) -> None:
        """Guided decoding of some rows; each goes on with a candidate of the step before, most of the time."""
        texts = [self.prompt() for _ in range(self.dice.randint(1, 6))]
        inputs: list[dict[str, Any]] = [{"token_ids": ids} for ids in texts]
        for step in range(self.dice.randint(2, 12)):
            shortlists = [sorted(set(self.ids(8))) for _ in texts]
            objective = {"kind": "equal_to", "target": 60}
            for row, ids in zip(inputs, shortlists, strict=True):
                row |= {"candidates": ids, "logprobs": [-2.0] * len(ids), "objective": objective, "generated": step}
            rows = await self.ask("/score", {"inputs": inputs})
            if not rows:
                return
            for text, ids, row in zip(texts, shortlists, rows, strict=True):
                if self.row(text, row):
                    at = self.dice.randrange(len(ids))
                    self.keep([*text, ids[at]], row["values"][at])
            if any("error" in row for row in rows):
                return
            chosen = [self.dice.choice(ids) if self.dice.random() < 0.9 else self.ids(1)[0] for ids in shortlists]
            texts = [[*text, token] for text, token in zip(texts, chosen, strict=True)]
            inputs = [{"session": row["session"], "append": [token]} for row, token in zip(rows, chosen, strict=True)]

    async def hang_up(self) -> None:
        """Ask, and be gone before the answer, or in the middle of the body."""
        host, port = self.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps({"inputs": [{"token_ids": self.prompt()} for _ in range(4)]}).encode()
        head = f"POST /predict_length HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        cut = len(body) if self.dice.random() < 0.8 else len(body) // 2
        writer.write(head + body[:cut])
        await asyncio.sleep(self.dice.uniform(0, 0.05))
        writer.transport.abort()
        self.seen["hung up"] += 1

    async def caller(self, work: Callable[[], Awaitable[None]], pause: float) -> None:
        """One kind of work again and again."""
        while time.monotonic() < self.end:
            try:
                await work()
            except (httpx2.HTTPError, OSError) as error:
                self.seen[type(error).__name__] += 1
            await asyncio.sleep(pause)

    async def run(self, seconds: float, callers: int, sample: Callable[[float], None]) -> None:
        """All kinds at once; ``sample`` is called every second."""
        begin = time.monotonic()
        self.end = begin + seconds
        kinds: list[tuple[Callable[[], Awaitable[None]], float]] = [
            (self.predict, 0.0), (self.session, 0.0), (self.steps, 0.0), (self.hang_up, 0.2),
        ]  # fmt: skip
        work = [asyncio.ensure_future(self.caller(*kind)) for kind in kinds for _ in range(callers)]
        while time.monotonic() < self.end:
            sample(time.monotonic() - begin)
            await asyncio.sleep(1)
        await asyncio.gather(*work)
        await self.client.aclose()


def device_mib(device: str) -> float | None:
    """Memory in use on the device, by all processes."""
    if not device.startswith("cuda"):
        return None
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2**20


def settled(replica: Replica) -> None:
    """Wait until nothing is worked on any more, but for the question itself."""
    end = time.monotonic() + 300
    while replica.metric("lenvm_requests_in_flight") > 1 or replica.metric("lenvm_queue_tokens") > 0:
        if time.monotonic() > end:
            raise SystemExit("requests are still in flight five minutes after the last one was sent")
        time.sleep(0.2)


def pool_accounting(replica: Replica, load: Load, context: int, contexts: int) -> dict[str, Any]:
    """Prompts that fill the pool (``contexts`` contexts and two blocks): what is in use then is theirs to the block."""
    settled(replica)
    held = {state: replica.metric("lenvm_cache_blocks", state=state) for state in ("used", "free")}
    dice, statuses = random.Random(99), []
    for length in [*[context] * contexts, BLOCK]:
        ids = [dice.randrange(20, load.vocabulary) for _ in range(length)]
        answer = httpx2.post(f"{replica.url}/predict_length", json={"token_ids": ids}, timeout=600)
        statuses.append(answer.status_code)
    settled(replica)
    used, free = (replica.metric("lenvm_cache_blocks", state=state) for state in ("used", "free"))
    wanted = contexts * context // BLOCK + 1
    return {
        "blocks_before": held,
        "blocks_used": used,
        "blocks_free": free,
        "blocks_wanted": wanted,
        "statuses": statuses,
        "exact": used == wanted and used + free == held["used"] + held["free"] and set(statuses) == {200},
    }


def checked(load: Load, model: LengthValueModel, number: int, dtype: str) -> dict[str, Any]:
    """Sampled answers against whole texts in float32."""
    scorer = TorchScorer(model, pool_tokens=1 << 15)
    chosen = load.dice.sample(load.kept, min(number, len(load.kept)))
    errors = []
    for ids, answered in chosen:
        (found,) = scorer.score([ScoreRow(append=ids)])
        errors.append(abs(float(value_from_logit(found.logits[-1])) - answered))
        found.state.close()
    mean, largest = TORCH_LIMITS[dtype]
    wrong = sum(error > largest or error != error for error in errors)
    return {
        "answers": load.answers,
        "checked": len(errors),
        "value_error_mean": statistics.mean(errors),
        "value_error_max": max(errors),
        "wrong": wrong,
        "right": wrong == 0 and statistics.mean(errors) <= mean,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a shipped checkpoint or a folder")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--contexts", type=int, default=1, help="size of the pool, in contexts of the model")
    parser.add_argument("--callers", type=int, default=2, help="of each kind")
    parser.add_argument("--longest", type=int, default=160, help="tokens of a prompt")
    parser.add_argument("--checks", type=int, default=300)
    parser.add_argument("--api-workers", type=int, default=1)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    # On the CPU until the load is over: on a GPU its memory would be counted.
    model = LengthValueModel.from_pretrained(options.model)
    context, vocabulary = model.context, int(model.decoder.config.vocab_size)
    flags = ["--device", options.device, "--dtype", options.dtype]
    flags += ["--cache-tokens", str(options.contexts * context + 2 * BLOCK)]
    if options.api_workers > 1:
        flags += ["--api-workers", str(options.api_workers)]
    resident: list[tuple[float, float]] = []
    on_device: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        replica = Replica(Path(scratch), *flags, model=options.model).ready()
        stack.callback(replica.stop)
        load = Load(replica.url, 1, vocabulary, options.longest)

        def sample(at: float) -> None:
            resident.append((at, replica.rss_mib()))
            if (used := device_mib(options.device)) is not None:
                on_device.append((at, used))

        asyncio.run(load.run(60 * options.minutes, options.callers, sample))
        pool = pool_accounting(replica, load, context, options.contexts)
        failures = replica.metric("lenvm_engine_failures_total")
    found: dict[str, Any] = {"minutes": options.minutes, "cache_tokens": options.contexts * context + 2 * BLOCK}
    late = resident[len(resident) // 3 :]
    found |= {"rss_mib": [late[0][1], late[-1][1]], "rss_slope_mib_per_minute": slope_per_minute(late)}
    if on_device:
        late = on_device[len(on_device) // 3 :]
        found |= {"device_mib": [late[0][1], late[-1][1]], "device_slope_mib_per_minute": slope_per_minute(late)}
    found |= {"pool": pool, "engine_failures": failures, "seen": dict(load.seen), "api_workers": options.api_workers}
    found |= {"answers": checked(load, model, options.checks, options.dtype)}
    print(dict(load.seen))
    for name in ("rss", "device"):
        if f"{name}_mib" in found:
            first, last = found[f"{name}_mib"]
            slope = found[f"{name}_slope_mib_per_minute"]
            print(f"{name:6} {first:,.0f} -> {last:,.0f} MiB, {slope:+.2f} MiB a minute")
    print(f"pool   {pool['blocks_used']:.0f} blocks in use, {pool['blocks_wanted']} wanted: exact {pool['exact']}")
    right = found["answers"]
    print(
        f"answers {right['answers']:,}, {right['checked']} checked: error {right['value_error_mean']:.2g} "
        f"(max {right['value_error_max']:.2g}), {right['wrong']} wrong; engine failures {failures:.0f}"
    )
    merge(options.report, {"memory": found}, options.device)


if __name__ == "__main__":
    main()
