"""The labelling server: pages and their assets, a labeller's items and answers; the admin's are in admin_server.py.

All writes run in the event loop's thread on the store's one connection, for a few milliseconds each; slower statistics
are computed in another thread on a read-only connection.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_jax.data.dialogues import is_hh, split_hh
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.address import Address
from rlhf_jax.feedback.admin_server import admin_routes
from rlhf_jax.feedback.guard import Guard, Refused, WrongTokens, read_body, text_field
from rlhf_jax.feedback.markdown import markdown_tree
from rlhf_jax.feedback.page import Page
from rlhf_jax.feedback.queue import Assignment, Conflict, Paused, Queue
from rlhf_jax.feedback.records import Item
from rlhf_jax.feedback.shown import Answer
from rlhf_jax.feedback.store import Labeller, Store

ASSETS = Path(__file__).parent / "assets"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
COOKIE_SECONDS = 30 * 24 * 3600
# A larger whole number is not exact in JavaScript, and one from 2^63 does not fit the database.
LARGEST = 2**53
_Handler = Callable[[Request], Awaitable[Response]]


class Service:
    """State shared by the routes: a store, its queue, and the server's address."""

    def __init__(self, store: Store, queue: Queue, address: Address) -> None:
        self.store, self.queue, self.address = store, queue, address
        self.wrong = WrongTokens()
        # Cookies are not separated by port, so folders served on one machine need different names.
        self.cookie = "label_" + hashlib.sha256(store.salt.encode()).hexdigest()[:12]

    def who(self, request: Request, *roles: str) -> Labeller:
        """The labeller of the request's token or cookie.

        Raises:
          Refused: without a valid token, or for a role that is not among `roles`.
        """
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            token = request.cookies.get(self.cookie, "")
        labeller = self.by_token(request, token)
        if labeller is None:
            raise Refused(401, "open the page by the link that you were given")
        if roles and labeller.role not in roles:
            raise Refused(403, "for the admin only")
        return labeller

    def by_token(self, request: Request, token: object) -> Labeller | None:
        """The labeller that a token belongs to, None for an unknown one.

        Raises:
          Refused: for a client with too many wrong tokens.
        """
        if not isinstance(token, str) or not token:
            return None
        client = "" if request.client is None else request.client.host
        self.wrong.refuse(client, token)
        labeller = self.store.by_token(token)
        self.wrong.count(client, token, right=labeller is not None)
        return labeller


def make_app(service: Service) -> Starlette:
    """Make the web application, which must be served by one process only."""

    async def log_in(request: Request) -> Response:
        body = await read_body(request)
        token = body.get("token")
        labeller = service.by_token(request, token)
        if labeller is None:
            raise Refused(401, "no labeller has this token; ask the admin for a new link")
        response = JSONResponse({"name": labeller.name, "role": labeller.role})
        response.set_cookie(
            service.cookie,
            str(token),
            max_age=COOKIE_SECONDS,
            httponly=True,
            samesite="strict",
            secure=service.address.url.startswith("https"),
        )
        return response

    async def log_out(request: Request) -> Response:
        response = JSONResponse({})
        response.delete_cookie(service.cookie, httponly=True, samesite="strict")
        return response

    async def page(request: Request) -> Response:
        service.who(request)
        instructions = service.queue.page.instructions
        marked = await run_in_threadpool(markdown_tree, instructions)
        version = hashlib.sha256(instructions.encode()).hexdigest()[:16] if instructions.strip() else ""
        return JSONResponse(service.queue.page.settings() | {"marked": marked, "version": version})

    async def task(request: Request) -> Response:
        labeller = service.who(request)
        assignment = service.queue.assign(labeller)
        progress = service.queue.progress(labeller)
        markdown = service.queue.page.markdown
        shown = None if assignment is None else await run_in_threadpool(_page, assignment, markdown)
        return JSONResponse(
            {
                "labeller": {
                    "name": labeller.name,
                    "role": labeller.role,
                    "screening": labeller.screening,
                    "paused": labeller.paused,
                },
                "progress": progress,
                "task": shown,
            }
        )

    async def draft(request: Request) -> Response:
        labeller = service.who(request)
        body = await read_body(request)
        item, revision, content = text_field(body, "item"), body.get("revision"), body.get("draft")
        if not isinstance(revision, int) or not 0 <= revision < 2**53 or not isinstance(content, dict):
            raise Refused(400, "draft: expected an item, a revision and a draft")
        service.queue.save_draft(labeller, item, content, revision)
        return JSONResponse({})

    async def judgement(request: Request) -> Response:
        labeller = service.who(request)
        body = await read_body(request)
        return JSONResponse(
            service.queue.judge(labeller, text_field(body, "request"), _answer(body, service.queue.page))
        )

    async def undo(request: Request) -> Response:
        labeller = service.who(request)
        body = await read_body(request)
        return JSONResponse(service.queue.undo(labeller, text_field(body, "request")))

    routes = [
        Route("/api/login", log_in, methods=["POST"]),
        Route("/api/logout", log_out, methods=["POST"]),
        Route("/api/page", page, methods=["POST"]),
        Route("/api/task", task, methods=["POST"]),
        Route("/api/draft", draft, methods=["POST"]),
        Route("/api/judgement", judgement, methods=["POST"]),
        Route("/api/undo", undo, methods=["POST"]),
        *admin_routes(service),
        Route("/", _asset("label.html")),
        Route("/admin", _asset("admin.html")),
        *(
            Route(f"/assets/{path.name}", _asset(path.name))
            for path in sorted(ASSETS.iterdir())
            if path.suffix in TYPES
        ),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, address=service.address)],
        exception_handlers={
            Refused: _refused,
            Paused: _paused,
            Conflict: _conflict,
            UserError: _mistake,
            404: _nothing,
            405: _nothing,
        },
    )


def _asset(name: str) -> _Handler:
    """Serve a file of the page from memory, so that no request's path is ever looked up on disk."""
    content = (ASSETS / name).read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {"etag": tag, "cache-control": "no-cache"}

    async def serve(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=TYPES[Path(name).suffix], headers=headers)

    return serve


def _page(assignment: Assignment, markdown: bool) -> dict[str, Any]:
    """An item as sent to the page: without its sources and gold ranks, and without marking calibration items."""
    item = assignment.item
    turns = _turns(item)
    responses = [item.responses[place].removeprefix(" ").strip("\n") for place in assignment.order]
    return {
        "id": item.id,
        "quiz": item.kind == "quiz",
        "turns": turns,
        "responses": responses,
        "marked": {
            "turns": [markdown_tree(turn["content"]) if markdown else None for turn in turns],
            "responses": [markdown_tree(text) if markdown else None for text in responses],
        },
        "draft": assignment.draft,
        "revision": assignment.revision,
    }


def _turns(item: Item) -> list[dict[str, str]]:
    if item.turns:
        return [{"role": turn.role, "content": turn.text} for turn in item.turns]
    if is_hh(item.prompt):
        turns = split_hh(item.prompt)
        if turns[-1].role == "assistant" and not turns[-1].content.strip():
            turns.pop()
        return [{"role": turn.role, "content": turn.content.strip()} for turn in turns]
    return [{"role": "text", "content": item.prompt.strip("\n")}]


def _answer(body: dict[str, Any], page: Page) -> Answer:
    """Parse the answer in a post; the queue checks that it fits the item.

    Raises:
      Refused: for a field of the wrong type.
    """
    ranks, ratings, flags = (body.get(name, []) for name in ("ranks", "ratings", "flags"))
    skip, seconds = body.get("skip", ""), body.get("seconds", 0.0)
    if not isinstance(ranks, list) or not all(_whole(rank) for rank in ranks):
        raise Refused(400, "ranks: expected a list of whole numbers")
    if not isinstance(ratings, list) or not all(rating is None or _whole(rating) for rating in ratings):
        raise Refused(400, "ratings: expected a list of whole numbers, null where there is none")
    if not isinstance(flags, list) or not all(
        isinstance(names, list) and all(name in page.flags for name in names if isinstance(name, str))
        for names in flags
    ):
        raise Refused(400, f"flags: expected a list of lists of {', '.join(page.flags) or 'none'}")
    if not all(isinstance(name, str) for names in flags for name in names):
        raise Refused(400, "flags: expected names")
    if not isinstance(skip, str) or isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise Refused(400, "skip: expected text; seconds: expected a number")
    if not -LARGEST <= seconds <= LARGEST:
        raise Refused(400, f"seconds: expected a number up to {LARGEST:,}")
    comments, corrects = body.get("comments", []), body.get("corrects")
    texts = {name: body.get(name, "") for name in ("rationale", "demonstration")}
    if not isinstance(comments, list) or not all(isinstance(one, str) for one in (*comments, *texts.values())):
        raise Refused(400, "comments: expected a list of texts; rationale, demonstration: expected text")
    if corrects is not None and not _whole(corrects):
        raise Refused(400, "corrects: expected a whole number or null")
    return Answer(
        item=text_field(body, "item"),
        ranks=tuple(ranks),
        ratings=tuple(ratings),
        flags=tuple(tuple(names) for names in flags),
        skip=skip.strip(),
        seconds=float(seconds),
        comments=tuple(comments),
        corrects=corrects,
        **texts,
    )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


async def _refused(_: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, Refused) else 400
    return JSONResponse({"error": str(error)}, status)


async def _paused(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 403)


async def _conflict(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 409)


async def _mistake(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 400)


async def _nothing(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": "there is nothing here"}, 404)
