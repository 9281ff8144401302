"""Settings of the server."""

import dataclasses
from typing import Literal

from minimind_jax.rules import ABOVE_0, Rule, Settings, at_least, setting


@dataclasses.dataclass(frozen=True)
class ServeConfig(Settings):
    """Models of this machine behind OpenAI's protocol, and with --web a chat page (docs/serve.md).

      minimind serve --model runs/assistant --web
      MINIMIND_API_KEY=... minimind serve --model runs/assistant --adapters runs/lawyer --host 0.0.0.0

    model: language models, classifiers and reward models: Hugging Face folders, runs, or names on the hub. Requests
        name them as their folder or run is called, or as NAME=FOLDER says; the first language model also answers what
        names none.
    adapters: low-rank adapters of the first language model, folders or runs; each is chosen as a model by its name.
    host: the address to listen at; 0.0.0.0 is every network of this machine.
    port: to listen at; 0 takes a free one, and says which.
    api_key_file: a file with API keys, one a line; MINIMIND_API_KEY in the environment holds one as well. With neither,
        whoever reaches the port may use the models.
    web: show a chat page at /.
    open: open the page in this machine's browser, if there is one, when the models are ready.
    tools: what the page may have carried out here, as for `minimind chat` (docs/tools.md).
    cors_origins: origins, such as https://chat.example.org, whose pages may call the server from a browser.
    slots: answers made at the same time.
    context: tokens of a prompt and its answer. null: the model's context, or as much of it as a third of the free
        memory holds for all slots, which is said.
    queue: requests that wait for a slot; more are refused (429). 0: whoever finds no free slot is.
    max_tokens: of an answer, where a request does not say. null: what its prompt leaves of the context.
    max_n: answers and prompts of one request.
    max_images: pictures of one request.
    max_body_mib: size of a request, and of the pictures together that are fetched for it.
    image_urls: requests may say the addresses of pictures on the web, which the server fetches, as long as they are of
        no private network. Otherwise pictures come within requests, as data URLs.
    max_seconds: that a request may take; an answer that takes longer ends with an error.
    drain_seconds: after SIGTERM or Ctrl-C open answers are finished for at most so long.
    thinking: let the model think first, where a request does not say.
    update_weights: whoever may ask may have a model take other weights, those of its folder or of a folder below it, as
        a training run does whose answers are written here (docs/rl_servers.md).
    dtype: of weights and activations; `auto` is bfloat16 on GPU and TPU, float32 on CPU.
    """

    model: tuple[str, ...] = setting(must=Rule(bool, "a model's folder or a run, as in --model runs/assistant"))
    adapters: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = setting(8000, must=Rule(lambda port: 0 <= port < 65536, "between 0 (any) and 65535"))
    api_key_file: str = ""
    web: bool = setting(False, alone=True)
    open: bool = setting(False, alone=True)
    tools: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    slots: int = setting(16, must=at_least(1))
    context: int | None = setting(None, must=at_least(2))
    queue: int = setting(256, must=at_least(0))
    max_tokens: int | None = setting(None, must=at_least(1))
    max_n: int = setting(64, must=at_least(1))
    max_images: int = setting(32, must=at_least(1))
    max_body_mib: float = setting(8.0, must=ABOVE_0)
    image_urls: bool = setting(False, alone=True)
    max_seconds: float = setting(600.0, must=ABOVE_0)
    drain_seconds: float = setting(30.0, must=at_least(0))
    thinking: bool = setting(False, alone=True)
    update_weights: bool = setting(False, alone=True)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @property
    def most_bytes(self) -> int:
        return int(self.max_body_mib * 2**20)

    @property
    def is_local(self) -> bool:
        """Only this machine reaches it."""
        return self.host in ("127.0.0.1", "localhost", "::1")

    def __post_init__(self):
        super().__post_init__()
        for name in ("tools", "open"):
            if getattr(self, name) and not self.web:
                raise ValueError(f"{name} is for the chat page, which is off; add --web, or drop --{name}")
        if "*" in self.cors_origins:
            raise ValueError("cors_origins holds *, by which any page on the web could use the models; name origins")
