"""/update_weights_from_disk: a model takes other weights while it is served, as SGLang's do."""

import asyncio
import contextlib
import dataclasses
from pathlib import Path

from minimind_jax.errors import UserError
from minimind_jax.inference.load import load_model
from minimind_jax.model.config import ModelConfig
from minimind_jax.serve.errors import ApiError
from minimind_jax.serve.log import logger
from minimind_jax.serve.models import Models
from minimind_jax.serve.protocol import Json, WeightsRequest
from minimind_jax.serve.worker import Worker


async def update(body: WeightsRequest, models: Models, worker: Worker, seconds: float) -> Json:
    """Takes the weights of a folder: that from which the model was started, or one below it. Open answers are finished
    with the old ones first. Raises ApiError or UserError; the old ones then stay."""
    served = models.get(body.model, "generate")
    folder = await asyncio.to_thread(_below, body.model_path, served.folder)
    model, params = await asyncio.to_thread(load_model, folder, served.engine.model.compute.dtype)
    own = served.engine.model.config
    if _without_ids(model.config) != _without_ids(own):
        raise UserError(f"{folder} holds a model of another shape than the one that is served; start a server with it")
    await worker.load(served.engine, params, seconds)
    for each in models:
        if each.engine is served.engine:
            each.weights = body.weight_version
    version = "" if body.weight_version is None else f", version {body.weight_version[:80]!r}"
    logger.info("%s has the weights of %s%s", served.name, folder, version)
    return {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}


def _below(path: str, top: Path) -> Path:
    """The folder, links followed. Raises ApiError where it is neither `top` nor below it."""
    top = top.resolve()
    with contextlib.suppress(OSError, ValueError):  # of what is no path
        if (folder := Path(path).resolve()).is_relative_to(top):
            return folder
    raise ApiError(403, f"model_path: {path[:200]!r} is neither {top} nor a folder below it", "model_path")


def _without_ids(config: ModelConfig) -> ModelConfig:
    """But for the tokens that begin and end a text, of which the engine has its own."""
    return dataclasses.replace(config, bos_token_id=None, eos_token_id=None, pad_token_id=None)
