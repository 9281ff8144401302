"""`minimind evaluate lm-eval`: lm_eval, where it is installed."""

import sys

from minimind_jax.config.tools import LMEvalConfig
from minimind_jax.errors import UserError
from minimind_jax.shell import install_command


def run(config: LMEvalConfig) -> None:
    """Runs lm_eval's own command with our model registered. Raises UserError where it is not installed."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import minimind_jax.evaluate.lm_eval_adapter  # noqa: F401  registers our model
    except ImportError as error:
        raise UserError(f"lm_eval cannot be imported ({error}); install it: {install_command('eval')}") from error
    sys.argv = ["lm_eval", *config.arguments]
    cli_evaluate()
