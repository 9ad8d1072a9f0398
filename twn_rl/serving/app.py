"""The app: routes, what stands before them, and the service behind them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from twn_rl import __version__
from twn_rl.serving.errors import add_handlers
from twn_rl.serving.gatekeeper import Gatekeeper
from twn_rl.serving.routes import router
from twn_rl.serving.service import EmbeddingService

logger = logging.getLogger(__name__)


def create_app(service: EmbeddingService, *, routers: Sequence[APIRouter] = ()) -> FastAPI:
    """Return the app of a service.

    A further router finds the service as `twn_rl.serving.routes.service_of(request)`; key, limits
    and errors are its, too.

    Args:
        service: Who embeds; it is started and stopped with the app.
        routers: Further routes, such as those of a page.
    """

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
    app.state.service = service
    add_handlers(app)
    for each in (router, *routers):
        app.include_router(each)
    settings = service.settings
    app.add_middleware(
        Gatekeeper, settings=settings, admission=service.admission, metrics=service.metrics
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.host_names))
    return app
