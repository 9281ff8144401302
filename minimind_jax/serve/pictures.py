"""The pictures that a request shows: how many there are, and where their content is."""

from collections.abc import Iterator
from typing import Any

from minimind_jax.config.serving import ServeConfig
from minimind_jax.data.formats import IMAGES
from minimind_jax.data.messages import CONTENT
from minimind_jax.data.pictures import check_part, is_picture, read_data_url, source_in, unwrap
from minimind_jax.inference.image_encoder import BLIND
from minimind_jax.serve.addresses import download
from minimind_jax.serve.errors import refused
from minimind_jax.serve.models import Served
from minimind_jax.serve.protocol import Body, ClassifyRequest, Json, ResponsesRequest

_FIELDS = (*IMAGES, "image_data", "multi_modal_data")  # ollama's, llama.cpp's and vLLM's


async def fetch(body: Body, served: Served, config: ServeConfig) -> bool:
    """Whether a request shows pictures; what it says to be on the web stands within it then. Raises ApiError: the model
    is blind, there are too many, or an address is not allowed or has nothing."""
    field, parts = _field_of(body), shown_in(body, served)
    for place in _elsewhere(body, field):
        where = "stand in input" if isinstance(body, ClassifyRequest) else "are parts of a message, in its content"
        words = f'pictures {where}: {{"type": "image_url", "image_url": {{"url": ...}}}}'
        raise refused(f"{place} is not looked at: {words}", place)
    if not parts:
        return False
    first = next(iter(parts))
    if "image" not in served.reads:
        raise refused(f"{first} is a picture, and {BLIND}", first, "images_not_supported")
    if len(parts) > config.max_images:
        words = f"the request shows {len(parts)} pictures; this server looks at {config.max_images} (--max_images)"
        raise refused(words, field, "too_many_images")
    addresses = {place: url for place, part in parts.items() if isinstance(url := unwrap(source_in(part)), str)}
    remote = {place: url for place, url in addresses.items() if url.lower().startswith(("http:", "https:"))}
    if remote and not config.image_urls:
        words = "this server fetches no pictures from addresses (--image_urls has it do so); send a data URL"
        raise refused(f"{next(iter(remote))}: {words}", next(iter(remote)))
    found = await download({url: place for place, url in remote.items()}, config.most_bytes) if remote else {}
    for place, url in remote.items():
        parts[place].clear()
        parts[place].update(type="image", image=found[url])
    return True


def content_of(address: str, where: str) -> bytes:
    """Of a picture that stands within a request. Raises ApiError or UserError."""
    if address[:5].lower() != "data:":
        raise refused(f"{where}: pictures come as data URLs, data:image/png;base64,... or the like", where)
    return read_data_url(address, where)


def shown_in(body: Body, served: Served) -> dict[str, Json]:
    """The parts of a request that are pictures, by their places. What a classifier of pictures is asked about has to be
    one: a text is the address of such a part, which takes its place. Raises ApiError."""
    field = _field_of(body)
    if not isinstance(body, ClassifyRequest):
        return dict(_parts(getattr(body, field, None), field))
    items, sees = body.input if isinstance(body.input, list) else [body.input], "image" in served.reads
    body.input = [{"image_url": item} if sees and isinstance(item, str) else item for item in items]
    parts = {f"{field}[{n}]": item for n, item in enumerate(body.input) if is_picture(item)}
    for place, part in parts.items():
        check_part(part, place)
    if sees and len(parts) < len(items):
        raise refused("every item of input has to be a picture, and this model classifies pictures", field)
    return parts


def _field_of(body: Body) -> str:
    return "input" if isinstance(body, ResponsesRequest | ClassifyRequest) else "messages"


def _parts(messages: Any, field: str) -> Iterator[tuple[str, Json]]:
    """The parts of messages, or of items of responses, that are pictures, by their places."""
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        for name in (*CONTENT, "output") if isinstance(message, dict) else ():
            parts = message.get(name)
            for number, part in enumerate(parts if isinstance(parts, list) else ()):
                if is_picture(part):
                    check_part(part, place := f"{field}[{index}].{name}[{number}]")
                    yield place, part


def _elsewhere(body: Body, field: str) -> Iterator[str]:
    """Places where other servers take pictures, and this one would answer without having seen them."""
    yield from (name for name in _FIELDS if (body.model_extra or {}).get(name))
    messages = None if isinstance(body, ClassifyRequest) else getattr(body, field, None)
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict):
            yield from (f"{field}[{index}].{name}" for name in _FIELDS if message.get(name))
