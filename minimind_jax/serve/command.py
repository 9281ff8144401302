"""`minimind serve`, where what it needs is installed."""

from minimind_jax.config.serving import ServeConfig
from minimind_jax.errors import UserError
from minimind_jax.shell import install_command


def run(config: ServeConfig) -> None:
    """Serves until a signal ends it. Raises UserError, also where a package is missing."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"serving needs packages that are not here ({error}); {install_command('serve')}") from error
    from minimind_jax.serve.listening import listen

    listen(config)
