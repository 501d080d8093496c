"""Label answers in the browser: people rate, flag and rank responses, and a reward model trains on what they said.

python scripts/label.py labels/first --data candidates.jsonl

python scripts/label.py labels/blind --run runs/sft --run runs/aligned --prompts prompts.jsonl

python scripts/label.py labels/team --data candidates.jsonl --labeller ann --labeller bob --labellers-per-item 2

Started again without --data it goes on with what the folder holds. A link with a token is printed for every new
labeller, and one for the admin at each start. Every answer is on the disk before the page says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

# The root, which holds the package `scripts`: a script finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlhf_jax.config import at_least
from rlhf_jax.data import Ledger, read_records
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.database import folder_lock
from rlhf_jax.feedback.guard import Address, is_loopback
from rlhf_jax.feedback.queue import Queue, Rules
from rlhf_jax.feedback.records import MOST_RESPONSES, Item
from rlhf_jax.feedback.store import Store
from rlhf_jax.feedback.tasks import read_tasks
from rlhf_jax.runs import say
from scripts import cli

ADMIN = "admin"
ALONE = "me"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of labelling."""

    folder: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FOLDER")]]
    """Where items and judgements are kept; made if it is not there."""
    data: tuple[str, ...] = ()
    """JSONL files of prompts with 2 to 9 responses, or of comparisons."""
    gold: bool = False
    """Keep the ranks of --data as gold, to measure labellers by."""
    calibration: tuple[str, ...] = ()
    """Files of items that every labeller judges, so that all can be compared."""
    quiz: tuple[str, ...] = ()
    """Files of items with ranks that screen labellers before anything else."""
    pass_mark: float = 0.7
    """Share of the quiz's ordered pairs that a labeller must have right."""
    run: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Run folders or published models that answer --prompts, compared blind; give it once for each."""
    prompts: tuple[str, ...] = ()
    """JSONL files of prompts for --run."""
    samples: int = 1
    """Responses of each run to a prompt."""
    max_new_tokens: int = 128
    """Most tokens of a sampled response."""
    temperature: float = 0.7
    """Divides the logits when responses are sampled."""
    seed: int = 0
    """Of what is sampled."""
    labeller: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Names of labellers; each gets a link with a token. None means one person on this machine."""
    new_link: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Labellers whose link was lost: it is made worthless, and another is printed."""
    labellers_per_item: int = 1
    """How many people judge each item."""
    lease_minutes: float = 30.0
    """How long an item waits for a labeller who does nothing before it goes to another."""
    host: str = "127.0.0.1"
    """Address to listen on. One that others can reach needs --labeller."""
    port: int = 8460
    """Port to listen on; 0 takes a free one."""
    origin: str = ""
    """Where the page is seen from outside, such as https://label.example.org, behind a proxy that speaks TLS."""
    serve: bool = True
    """Serve the page; --no-serve only fills the folder."""

    def __post_init__(self) -> None:
        for field, low in (("samples", 1), ("max_new_tokens", 1), ("labellers_per_item", 1), ("port", 0), ("seed", 0)):
            at_least(self, field, low)
        at_least(self, "temperature", 0)
        if not 0 <= self.pass_mark <= 1:
            raise UserError(f"pass_mark: found {self.pass_mark}, wanted 0 to 1")
        if not self.lease_minutes > 0:
            raise UserError(f"lease_minutes: found {self.lease_minutes}, wanted more than 0")
        if bool(self.run) != bool(self.prompts):
            found, wanted = ("--run", "--prompts") if self.run else ("--prompts", "--run")
            raise UserError(f"{wanted[2:]}: found {found} without {wanted}, wanted both or neither")
        if self.run and not 2 <= len(self.run) * self.samples <= MOST_RESPONSES:
            raise UserError(
                f"samples: found {len(self.run)} runs with {self.samples} samples each, wanted 2 to {MOST_RESPONSES} "
                "responses to a prompt"
            )


def run(config: Config) -> None:
    """Fills the folder and serves it until it is told to stop."""
    if config.serve and not is_loopback(config.host) and not config.labeller and not _has_people(config):
        raise UserError(
            f"host: found {config.host}, which others can reach, wanted labellers with tokens; give --labeller NAME"
        )
    folder = Path(config.folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: found a file, wanted a folder for labels")
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder), contextlib.closing(Store(folder)) as store:
        added = store.add_items(items_of(config))
        total = len(store.items())
        say(f"{folder}: {total:,} items, {added:,} of them new")
        if not total:
            raise UserError(f"{folder}: found no items, wanted some; give --data FILE or --run, --run and --prompts")
        if config.serve:
            serve(config, store)


def items_of(config: Config) -> Iterator[Item]:
    """What the command line asks to label."""
    yield from read_tasks(config.quiz, kind="quiz", gold=True)
    yield from read_tasks(config.calibration, kind="calibration", gold=config.gold)
    yield from read_tasks(config.data, gold=config.gold)
    if config.run:
        # Models take seconds to import.
        from rlhf_jax.feedback.sampled import sample_items
        from rlhf_jax.sources import LANGUAGE, open_source

        yield from sample_items(
            [open_source(spec, stages=LANGUAGE) for spec in config.run],
            read_records(config.prompts, "prompts", Ledger()),
            samples=config.samples,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed,
        )


def serve(config: Config, store: Store) -> None:
    """Serves until SIGINT or SIGTERM; what is being answered then is answered."""
    try:
        import uvicorn

        from rlhf_jax.feedback.server import Service, link, make_app
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; wanted the extra: pip install 'rlhf_jax[ui]'") from None

    with listen(config.host, config.port) as listening:
        address = Address(config.host, listening.getsockname()[1], config.origin)
        rules = Rules(config.labellers_per_item, config.lease_minutes * 60, config.pass_mark)
        service = Service(store, Queue(store, rules), address)
        for name, token in new_tokens(config, store):
            print(f"{name}: {link(address, token)}")
        print(f"serving {store.folder} at {address.url}; Ctrl-C stops, and nothing is lost", flush=True)
        server = uvicorn.Server(
            uvicorn.Config(
                make_app(service),
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                http="h11",
                timeout_keep_alive=30,
                timeout_graceful_shutdown=5,
            )
        )
        # uvicorn raises the signal that stopped it once more when it is done: that is no accident here.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            server.run(sockets=[listening])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    print(f"stopped; everything is in {store.folder}", flush=True)


def new_tokens(config: Config, store: Store) -> Iterator[tuple[str, str]]:
    """(name, token) of whoever gets a new one at this start."""
    known = {labeller.name: labeller for labeller in store.labellers()}
    for name in config.new_link:
        if name not in known:
            raise UserError(
                f"new_link: found {name!r}, wanted one of the folder's labellers: {', '.join(known) or 'none'}"
            )
        store.revoke(known[name])
    people = [store.add_labeller(name) for name in config.labeller if name != ADMIN]
    if not people and not any(labeller.role == "labeller" for labeller in known.values()):
        people = [store.add_labeller(ALONE)]
    # Alone on this machine, one link at each start is what a person looks for.
    for person in {labeller.name: labeller for labeller in (*people, *known.values())}.values():
        if person.role == "labeller" and (not store.has_token(person) or person.name in (ALONE, *config.new_link)):
            yield person.name, store.new_token(person)
    yield "admin page", store.new_token(store.add_labeller(ADMIN, "admin"))


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections. Raises: UserError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)
    except (OSError, OverflowError) as error:
        listening.close()
        reason: Any = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"host, port: found {host}:{port}, which cannot be had: {reason}; give another --port"
        ) from None
    return listening


def _has_people(config: Config) -> bool:
    """Whether the folder has labellers with tokens, of whom none is the one that stands for whoever sits here."""
    folder = Path(config.folder)
    if not (folder / "labels.sqlite").exists():
        return False
    with contextlib.closing(Store(folder, read_only=True)) as store:
        people = [labeller for labeller in store.labellers() if labeller.role == "labeller"]
        return any(labeller.name != ALONE and store.has_token(labeller) for labeller in people)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Serves and exits. argv: arguments without the program's name; None for those of this process."""
    cli.main(run, Config, __doc__, argv)


if __name__ == "__main__":
    cli.use_compilation_cache()
    main()
