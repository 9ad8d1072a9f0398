"""The app: routes, what stands before them, and the service behind them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from twn_rl import __version__
from twn_rl.inference.collection import Collection
from twn_rl.inference.encode_file import fingerprints
from twn_rl.serving import cohere, routes, search_routes
from twn_rl.serving.errors import add_handlers
from twn_rl.serving.gatekeeper import Gatekeeper
from twn_rl.serving.service import EmbeddingService

logger = logging.getLogger(__name__)


def create_app(
    service: EmbeddingService,
    *,
    collection: Collection | None = None,
    routers: Sequence[APIRouter] = (),
) -> FastAPI:
    """Return the app of a service.

    A further router finds the service as `twn_rl.serving.routes.service_of(request)`; key, limits
    and errors are its, too.

    Args:
        service: Who embeds; it is started and stopped with the app.
        collection: What `POST /search` searches; None has nothing to search.
        routers: Further routes, such as those of a page.

    Raises:
        CollectionError: If the collection's vectors are another model's.
    """
    if collection is not None:
        model = service.embedder.model
        collection.check_space(fingerprints(model, "document", "never")["space"])

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            if not await service.stop():
                logger.error("the engine did not end within drain_seconds")

    # No pages of FastAPI's own: they load scripts from another host.
    app = FastAPI(
        title="twn_rl", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.service, app.state.collection = service, collection
    add_handlers(app)
    for each in (routes.router, cohere.router, search_routes.router, *routers):
        app.include_router(each)
    settings = service.settings
    app.add_middleware(
        Gatekeeper, settings=settings, admission=service.admission, metrics=service.metrics
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.host_names))
    return app
