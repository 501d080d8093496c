"""Adds items to a labelling folder and serves its web page, for `rlhf-jax label`."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_jax.data import Ledger, read_records
from rlhf_jax.errors import UserError, install_command
from rlhf_jax.feedback.address import Address, is_loopback
from rlhf_jax.feedback.database import folder_lock
from rlhf_jax.feedback.page import read_page
from rlhf_jax.feedback.queue import Queue, Rules
from rlhf_jax.feedback.records import Item
from rlhf_jax.feedback.store import Store
from rlhf_jax.feedback.tasks import read_demonstration_tasks, read_tasks
from rlhf_jax.runs.lifecycle import say

ADMIN = "admin"
ALONE = "me"

if TYPE_CHECKING:
    from rlhf_jax.cli.label import Config


def run(config: Config) -> None:
    """Adds the items to the folder and serves the page until SIGINT or SIGTERM."""
    if config.serve and not is_loopback(config.host) and not config.labeller and not _has_people(config):
        raise UserError(
            f"host: expected labellers with tokens, as others can reach the page, got {config.host} without; give "
            "--labeller NAME"
        )
    folder = Path(config.folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: expected a labelling folder, got a file")
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder), contextlib.closing(Store(folder)) as store:
        if config.page:
            store.set_page(read_page(config.page))
        ledger = Ledger()
        added = store.add_items(items_of(config, ledger))
        total = len(store.items())
        if ledger.decisions:
            say(f"{ledger.counts()}\nevery one of them is in {folder / 'ledger.json'}")
        if ledger.total:
            ledger.save(folder / "ledger.json")
        say(f"{folder}: {total:,} items, {added:,} of them new")
        if not total:
            raise UserError(
                f"{folder}: expected at least 1 item, got none; give --data FILE, --demonstrations FILE, or "
                "--run, --run and --prompts"
            )
        if config.serve:
            serve(config, store)


def items_of(config: Config, ledger: Ledger) -> Iterator[Item]:
    """Items that the command line adds; the ledger gets the rows of its files."""
    yield from read_tasks(config.quiz, kind="quiz", gold=True, ledger=ledger)
    yield from read_tasks(config.calibration, kind="calibration", gold=config.gold, ledger=ledger)
    yield from read_tasks(config.data, gold=config.gold, ledger=ledger)
    yield from read_demonstration_tasks(config.demonstrations, ledger=ledger)
    if config.run:
        # Imported here: the model code takes seconds to import.
        from rlhf_jax.feedback.sampled import sample_items
        from rlhf_jax.pretrained.source import LANGUAGE, longest_answer, open_source

        prompts = read_records(config.prompts, "prompts", ledger)
        for prompt in prompts:
            ledger.keep(prompt.where)
        sources = [open_source(spec, stages=LANGUAGE) for spec in config.run]
        yield from sample_items(
            sources,
            prompts,
            samples=config.samples,
            max_new_tokens=longest_answer(sources, config.max_new_tokens),
            temperature=config.temperature,
            seed=config.seed,
        )


def serve(config: Config, store: Store) -> None:
    """Serves until SIGINT or SIGTERM; requests in flight are completed."""
    try:
        import uvicorn

        from rlhf_jax.feedback.server import Service, make_app
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; run: {install_command('ui')}") from None

    with listen(config.host, config.port) as listening:
        address = Address(config.host, listening.getsockname()[1], config.origin)
        rules = Rules(config.labellers_per_item, config.lease_minutes * 60, config.pass_mark)
        service = Service(store, Queue(store, rules), address)
        for name, token in new_tokens(config, store):
            print(f"{name}: {address.link(token)}")
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
        # uvicorn handles signals while it runs and re-raises them when it is done; before and after, a stop by signal
        # is a normal exit too.
        before = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            print(f"serving {store.folder} at {address.url}; Ctrl-C stops, and nothing is lost", flush=True)
            server.run(sockets=[listening])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    print(f"stopped; everything is in {store.folder}", flush=True)


def new_tokens(config: Config, store: Store) -> Iterator[tuple[str, str]]:
    """Yields (name, token) for everyone who gets a new token at this start."""
    known = {labeller.name: labeller for labeller in store.labellers()}
    for name in config.new_link:
        if name not in known:
            raise UserError(
                f"new_link: expected one of the folder's labellers: {', '.join(known) or 'none'}, got {name!r}"
            )
        store.revoke(known[name])
    people = [store.add_labeller(name) for name in config.labeller if name != ADMIN]
    if not people and not any(labeller.role == "labeller" for labeller in known.values()):
        people = [store.add_labeller(ALONE)]
    # A single labeller on this machine gets a new link at each start.
    for person in {labeller.name: labeller for labeller in (*people, *known.values())}.values():
        if person.role == "labeller" and (not store.has_token(person) or person.name in (ALONE, *config.new_link)):
            yield person.name, store.new_token(person)
    yield "admin page", store.new_token(store.add_labeller(ADMIN, "admin"))


def listen(host: str, port: int) -> socket.socket:
    """Opens a socket that accepts connections.

    Raises:
      UserError: if the address is not available.
    """
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
            f"host, port: expected an address to listen on, got {host}:{port}: {reason}; give another --port"
        ) from None
    return listening


def _has_people(config: Config) -> bool:
    """True if the folder has a labeller with a token, other than the default one for a person on this machine."""
    folder = Path(config.folder)
    if not (folder / "labels.sqlite").exists():
        return False
    with contextlib.closing(Store(folder, read_only=True)) as store:
        people = [labeller for labeller in store.labellers() if labeller.role == "labeller"]
        return any(labeller.name != ALONE and store.has_token(labeller) for labeller in people)
