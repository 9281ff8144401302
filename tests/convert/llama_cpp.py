"""Real llama.cpp in this process, by the package xllamacpp: its server, asked over its own API."""

import json
import urllib.request

import numpy as np


class LlamaCpp:
    """A server over a GGUF file, and over it a LoRA file; one thread, everything it keeps in float32."""

    def __init__(self, model, adapter=None):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_ram_mib = 0
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        if adapter:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(params)

    def ask(self, path, **body):
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def encode(self, text):
        return self.ask("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]

    def prompt(self, messages, **more):
        return self.ask("/apply-template", messages=messages, **more)["prompt"]

    def greedy(self, ids, count, top=5):
        """(ids, steps, top) of the likeliest tokens of every step, and their log-probabilities."""
        found = self.ask(
            "/completion", prompt=[int(i) for i in ids], n_predict=count, n_probs=top, temperature=-1, ignore_eos=True,
            cache_prompt=False,
        )  # fmt: skip
        steps = [step["top_logprobs"] for step in found["completion_probabilities"]]
        return (np.array([[token[key] for token in step] for step in steps]) for key in ("id", "logprob"))
