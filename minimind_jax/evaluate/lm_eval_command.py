"""`minimind evaluate lm-eval`: lm_eval, where it is installed."""

from minimind_jax.config.tools import LMEvalConfig
from minimind_jax.errors import UserError
from minimind_jax.shell import install_command


def run(config: LMEvalConfig) -> None:
    """Runs lm_eval's own command with our model registered. Raises UserError where it is not installed."""
    try:
        from minimind_jax.evaluate import lm_eval_adapter
    except ImportError as error:
        raise UserError(f"lm_eval cannot be imported ({error}); install it: {install_command('eval')}") from error
    lm_eval_adapter.run(config.arguments)
