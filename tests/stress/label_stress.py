"""What the labelling server stands: labellers who retry every post while it is killed, and a hundred thousand items.

python tests/stress/label_stress.py

Prints one JSON object: how many rows there are, how many acknowledged ones were lost or changed, how many pairs of item
and labeller are doubled, and the 95th percentile of each kind of request in milliseconds.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import http.client
import itertools
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

# The root, which holds the package: a script finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rlhf_jax.cli.app import execute
from rlhf_jax.feedback.records import Item, Judgement
from rlhf_jax.feedback.store import Store
from rlhf_jax.feedback.tasks import make_item

RESPONSES = 4
SCRIPT = Path(__file__).parents[2] / "scripts" / "label.py"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the trial."""

    labellers: int = 16
    """Labellers at work at once."""
    items: int = 1000
    """Items, each for every labeller."""
    kills: int = 50
    """SIGKILLs of the server, spread over the work."""
    repeats: int = 3
    """Times that each acknowledged post is sent again."""
    stored: int = 100_000
    """Items in the folder whose pages are timed."""
    requests: int = 500
    """Requests of each kind that are timed."""


class Server:
    """scripts/label.py in a process of its own, which may be killed and started again on the same port."""

    def __init__(self, folder: Path, *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._command = [sys.executable, str(SCRIPT), str(folder), "--port", str(self.port), *flags]
        self._process: subprocess.Popen[str] | None = None
        self.links: dict[str, str] = {}

    def start(self) -> None:
        """Returns once it serves. Raises: RuntimeError with what it said if it ended instead."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said = []
        for line in self._process.stdout or ():
            said.append(line)
            name, _, link = line.rstrip().partition(": http")
            self.links[name] = f"http{link}"
            if line.startswith("serving"):
                return
        raise RuntimeError("".join(said))

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is closed."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def stop(self) -> None:
        """SIGTERM."""
        if self._process is not None:
            self._process.terminate()
            self._process.communicate(timeout=20)


class Person:
    """A labeller's client, which sends a post until it is answered."""

    def __init__(self, port: int, token: str) -> None:
        self._port, self._token = port, token
        self._connection: http.client.HTTPConnection | None = None

    def once(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """One request on the open connection, or on a new one."""
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        headers = {"authorization": f"Bearer {self._token}", "content-type": "application/json"}
        content = None if method == "GET" else json.dumps({} if body is None else body)
        try:
            self._connection.request(method, path, content, headers)
            response = self._connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            self._connection = None
            raise

    def post(self, path: str, body: Any = None) -> tuple[int, Any]:
        """(status, JSON), however often the server dies before it answers."""
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, content = self.once("POST", path, body)
                return status, json.loads(content)
            time.sleep(0.05)

    def close(self) -> None:
        """Hangs up."""
        if self._connection is not None:
            self._connection.close()


def items_of(count: int) -> Iterator[Item]:
    """Items whose responses say which they are."""
    for number in range(count):
        yield make_item(f"Prompt {number}: say something.", [f"Answer {k} to {number}." for k in range(RESPONSES)])


def kills(folder: Path, *, labellers: int, items: int, kills: int, repeats: int) -> dict[str, Any]:
    """Every labeller judges every item while the server is killed; what is stored against what was answered."""
    tokens = {}
    with contextlib.closing(Store(folder)) as store:
        store.add_items(items_of(items))
        for number in range(labellers):
            person = store.add_labeller(f"p{number}")
            tokens[person.name] = store.new_token(person)
    server = Server(folder, "--labellers-per-item", str(labellers), "--labeller", "p0")
    answered: dict[tuple[str, str], tuple[int, ...]] = {}
    odd: collections.Counter[str] = collections.Counter()

    def work(name: str) -> None:
        dice, client = random.Random(name), Person(server.port, tokens[name])
        for number in itertools.count():
            status, page = client.post("/api/task")
            if status != 200:
                odd[f"status {status}"] += 1
                break
            if page["task"] is None:
                break
            task = page["task"]
            ranks = [dice.randint(1, RESPONSES) for _ in task["responses"]]
            body = {"request": f"{name} {number}", "item": task["id"], "ranks": ranks, "seconds": 1.0}
            reply = client.post("/api/judgement", body)
            if reply[0] != 200:
                odd[f"status {reply[0]}"] += 1
            # In the item's own order and without gaps, as the database shall have them.
            own = sorted(zip([int(text.split()[1]) for text in task["responses"]], ranks, strict=True))
            places = sorted({rank for _, rank in own})
            answered[name, task["id"]] = tuple(places.index(rank) + 1 for _, rank in own)
            odd["different replies"] += sum(client.post("/api/judgement", body) != reply for _ in range(repeats))
        client.close()

    started = time.monotonic()
    server.start()
    threads = [threading.Thread(target=work, args=(name,)) for name in tokens]
    for thread in threads:
        thread.start()
    dice, killed, downtime = random.Random(0), 0, 0.0
    for number in range(kills):
        goal = (number + 0.5) / kills * labellers * items
        while len(answered) < goal and any(thread.is_alive() for thread in threads):
            time.sleep(0.005)
        time.sleep(dice.random() * 0.05)
        killed += any(thread.is_alive() for thread in threads)
        at = time.monotonic()
        server.kill()
        server.start()
        downtime += time.monotonic() - at
    for thread in threads:
        thread.join()
    server.stop()
    with contextlib.closing(Store(folder, read_only=True)) as store:
        stored = [((judgement.labeller, judgement.item), judgement.ranks) for judgement in store.judgements()]
        (sound,) = store.db.execute("PRAGMA integrity_check").fetchone()
    found = dict(stored)
    return {
        "wanted": labellers * items,
        "rows": len(stored),
        "acknowledged": len(answered),
        "lost": sum(pair not in found for pair in answered),
        "changed": sum(found.get(pair, ranks) != ranks for pair, ranks in answered.items()),
        "doubled": len(stored) - len(found),
        "unacknowledged_rows": len(found.keys() - answered.keys()),
        "different_replies": odd.pop("different replies"),
        "other_answers": dict(odd),
        "kills": killed,
        "integrity": sound,
        "seconds": round(time.monotonic() - started, 1),
        "seconds_down": round(downtime, 1),
    }


def latency(folder: Path, *, items: int, requests: int) -> dict[str, Any]:
    """Milliseconds of each kind of request with so many items, half of them judged."""
    with contextlib.closing(Store(folder)) as store:
        store.add_items(items_of(items))
        ids = [item.id for item in store.items()]
        said = [(id, f"p{number % 4}") for number, id in enumerate(ids[: items // 2])]
        store.record(Judgement(id, name, (1, 2, 3, 4), seconds=3.0, at=time.time() - 60) for id, name in said)
        person, boss = store.add_labeller("p0"), store.add_labeller("boss", "admin")
        tokens = [store.new_token(person), store.new_token(boss)]
    server = Server(folder, "--labeller", "p0")
    server.start()
    took: dict[str, list[float]] = collections.defaultdict(list)
    client, admin = (Person(server.port, token) for token in tokens)

    def timed(name: str, ask: Callable[[], tuple[int, bytes]]) -> Any:
        start = time.perf_counter()
        status, content = ask()
        took[name].append(1000 * (time.perf_counter() - start))
        if status != 200:
            raise RuntimeError(f"{name}: status {status}: {content[:200]!r}")
        return content

    for number in range(requests):
        timed("page", lambda: client.once("GET", "/"))
        timed("script", lambda: client.once("GET", "/assets/label.js"))
        item = json.loads(timed("task", lambda: client.once("POST", "/api/task")))["task"]["id"]
        draft = {"item": item, "revision": number + 1, "draft": {"tiers": [[0, 1]], "ratings": [1, None, 7, 3]}}
        timed("draft", lambda body=draft: client.once("POST", "/api/draft", body))  # type: ignore[misc]
        body = {"request": f"r{number}", "item": item, "ranks": [1, 2, 3, 4], "seconds": 1.0}
        timed("judgement", lambda body=body: client.once("POST", "/api/judgement", body))  # type: ignore[misc]
        if number % 10 == 0:
            timed("undo", lambda body={"request": f"u{number}"}: client.once("POST", "/api/undo", body))  # type: ignore[misc]
        timed("admin page", lambda: admin.once("GET", "/admin"))
    slow = {}
    for path in ("/api/admin/summary", "/api/admin/figures"):
        start = time.perf_counter()
        admin.once("GET", path)
        slow[path] = round(time.perf_counter() - start, 2)
    for one in (client, admin):
        one.close()
    server.stop()
    return {
        "items": items,
        "p50": {name: round(statistics.median(times), 2) for name, times in took.items()},
        "p95": {name: round(_quantile(times, 0.95), 2) for name, times in took.items()},
        "admin_seconds": slow,
    }


def run(config: Config) -> None:
    """Both trials, in a folder that is removed again."""
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "kills": kills(
                Path(folder, "kills"),
                labellers=config.labellers,
                items=config.items,
                kills=config.kills,
                repeats=config.repeats,
            ),
            "latency": latency(Path(folder, "latency"), items=config.stored, requests=config.requests),
        }
    print(json.dumps(result, indent=2))


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Tries and exits. argv: arguments without the program's name; None for those of this process."""
    execute(
        Config,
        run,
        sys.argv[1:] if argv is None else argv,
        description=__doc__ or "",
        program="python tests/stress/label_stress.py",
        own_process=argv is None,
    )


if __name__ == "__main__":
    main()
