"""`minimind serve`, where what it needs is installed."""

from minimind_jax.config.serving import ServeConfig
from minimind_jax.shell import needing


def run(config: ServeConfig) -> None:
    """Serves until a signal ends it. Raises UserError, also where a package is missing."""
    with needing("serving needs packages that are not here", "serve"):
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    from minimind_jax.serve.listening import listen

    listen(config)
