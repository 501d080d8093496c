"""The admin's routes: statistics, labellers and their links, rejected judgements, uploads and the export."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_jax.data.ledger import Ledger
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import admin
from rlhf_jax.feedback.export import FORMS, export
from rlhf_jax.feedback.guard import Refused, read_body, read_bytes, text_field
from rlhf_jax.feedback.judged import item_row, judgement_row
from rlhf_jax.feedback.oversight import pause, reject
from rlhf_jax.feedback.records import Item
from rlhf_jax.feedback.store import Labeller, Store
from rlhf_jax.feedback.tasks import read_demonstration_tasks, read_tasks

if TYPE_CHECKING:
    from rlhf_jax.feedback.server import Service

FRESH_SECONDS = 5.0
MOST_UPLOADED = 64 * 2**20
"""Bytes of a file that is uploaded."""
UPLOADS: dict[str, Callable[[Path, Ledger], list[Item]]] = {
    "compare": lambda path, ledger: read_tasks([path], ledger=ledger),
    "write": lambda path, ledger: read_demonstration_tasks([path], ledger=ledger),
    "calibration": lambda path, ledger: read_tasks([path], kind="calibration", ledger=ledger),
    "quiz": lambda path, ledger: read_tasks([path], kind="quiz", gold=True, ledger=ledger),
}
"""Readers of uploaded files, by what labellers do with the items."""


def admin_routes(service: Service) -> list[Route]:
    """The routes below /api/admin/."""
    drawing = asyncio.Lock()
    drawn: tuple[float, dict[str, Any]] = (0.0, {})

    async def summary(request: Request) -> Response:
        service.who(request, "admin")

        def draw() -> dict[str, Any]:
            with _reader(service.store) as store:
                wanted, now = service.queue.rules.wanted, time.time()
                return {
                    **admin.throughput(store, now),
                    "progress": admin.progress(store, wanted),
                    "skips": admin.skips(store),
                    "latest": admin.latest(store),
                }

        figures = await run_in_threadpool(draw)
        quiz = service.queue.quizzes > 0
        marks = {person.name: service.queue.quiz_mark(person) for person in service.store.labellers() if quiz}
        for person in figures["people"]:
            person["quiz"] = marks.get(person["name"])
        return JSONResponse(
            figures | {"labellers_per_item": service.queue.rules.wanted, "flags": dict(service.queue.page.flags)}
        )

    async def figures(request: Request) -> Response:
        """Agreement, win rates and disagreements, cached for a few seconds."""
        nonlocal drawn
        service.who(request, "admin")
        async with drawing:
            if not drawn[1] or time.monotonic() - drawn[0] > FRESH_SECONDS:
                drawn = (time.monotonic(), await run_in_threadpool(_draw, service.store))
        return JSONResponse(drawn[1])

    def known(name: str) -> Labeller:
        for person in service.store.labellers():
            if person.name == name:
                return person
        raise Refused(404, "there is no such labeller")

    async def labeller(request: Request) -> Response:
        service.who(request, "admin")
        body = await read_body(request)
        name, deed = text_field(body, "name"), text_field(body, "do")
        person = service.store.add_labeller(name) if deed == "add" else known(name)
        if deed == "revoke":
            service.store.revoke(person)
            return JSONResponse({"name": name})
        if deed in ("pause", "resume") and person.role == "labeller":
            pause(service.queue, person, deed == "pause")
            return JSONResponse({"name": name})
        if deed not in ("add", "link") or person.role == "model":
            raise Refused(400, "do: expected add, link, revoke, pause or resume, of a person")
        return JSONResponse({"name": name, "link": service.address.link(service.store.new_token(person))})

    async def rejection(request: Request) -> Response:
        boss = service.who(request, "admin")
        body = await read_body(request)
        item, why = body.get("item"), body.get("why")
        if not (item is None or isinstance(item, str)) or not isinstance(why, str):
            raise Refused(400, "why: expected a reason; item: expected an item's id, or null for all")
        person = known(text_field(body, "name"))
        return JSONResponse(reject(service.queue, boss, text_field(body, "request"), person, why, item))

    async def items(request: Request) -> Response:
        service.who(request, "admin")
        kind = request.query_params.get("kind", "compare")
        if kind not in UPLOADS:
            raise Refused(400, f"kind: expected one of {', '.join(UPLOADS)}")
        content = await read_bytes(request, "application/x-ndjson", MOST_UPLOADED)
        read, left_out = await run_in_threadpool(_read_upload, request.query_params.get("name", ""), content, kind)
        added = service.store.add_items(read)
        service.queue.refresh()
        return JSONResponse({"items": len(read), "added": added, "left_out": left_out})

    async def archive(request: Request) -> Response:
        service.who(request, "admin")
        content = await run_in_threadpool(_export, service.store)
        headers = {"content-disposition": 'attachment; filename="labels.zip"'}
        return Response(content, media_type="application/zip", headers=headers)

    return [
        Route("/api/admin/summary", summary),
        Route("/api/admin/figures", figures),
        Route("/api/admin/labeller", labeller, methods=["POST"]),
        Route("/api/admin/reject", rejection, methods=["POST"]),
        Route("/api/admin/items", items, methods=["POST"]),
        Route("/api/admin/export", archive),
    ]


@contextlib.contextmanager
def _reader(store: Store) -> Iterator[Store]:
    """A read-only connection for the current thread."""
    with contextlib.closing(store.beside()) as reader:
        yield reader


def _draw(store: Store) -> dict[str, Any]:
    with _reader(store) as reader:
        items, judgements = admin.recent(reader)
        flag_names = tuple(reader.page().flags)
    return admin.agreement(items, judgements, flag_names) | {"disagreements": admin.disagreements(items, judgements)}


def _read_upload(name: str, content: bytes, kind: str) -> tuple[list[Item], str]:
    """Read an uploaded file: (items, counts of rows that are no item of their own, or ""); with its name as given."""
    ledger = Ledger()
    name = re.sub(r"[^\w.-]", "_", name)[-80:].lstrip(".") or "upload.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        try:
            items = UPLOADS[kind](path, ledger)
            return items, ledger.counts().replace(f"{folder}/", "") if ledger.rejected else ""
        except UserError as error:
            raise UserError(str(error).replace(f"{folder}/", "")) from None


def _export(store: Store) -> bytes:
    """A zip archive of every form of export and all records as JSONL; the same judgements give the same bytes."""
    with _reader(store) as reader:
        items, judgements, page = reader.items(), reader.judgements(), reader.page()
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMS:
            export(items, judgements, Path(folder, form), form=form)
        for name, rows in (("items", map(item_row, items)), ("judgements", map(judgement_row, judgements))):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            Path(folder, f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        Path(folder, "page.json").write_text(
            json.dumps(page.settings(), ensure_ascii=False, indent=1), encoding="utf-8"
        )
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as files:
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    # A fixed date makes the archive of the same files identical.
                    entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), (1980, 1, 1, 0, 0, 0))
                    entry.compress_type = zipfile.ZIP_DEFLATED
                    files.writestr(entry, path.read_bytes())
        return archive.getvalue()
