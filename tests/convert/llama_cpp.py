"""Real llama.cpp in this process, by the package xllamacpp: its server, asked over its own API."""

import base64
import json
import urllib.request

import numpy as np


class LlamaCpp:
    """A server over a GGUF file, and over it a LoRA file, or beside it an mmproj file; one thread, everything it keeps
    in float32."""

    def __init__(self, model, adapter=None, mmproj=None):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_ram_mib = 0
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        if mmproj:
            params.mmproj.path, params.mmproj_use_gpu = str(mmproj), False
        if adapter:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(params)

    def ask(self, path, **body):
        """A POST of the body, or a GET without one."""
        request = urllib.request.Request(
            self._server.listening_address + path,
            json.dumps(body).encode() if body else None,
            {"Content-Type": "application/json"},
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

    def see(self, messages, pictures, count, top=5):
        """(prompt, its number of tokens, ids of the answer, top of its first step) to messages whose images, parts of
        the type image_url, are `pictures`, the contents of files. In the prompt, `<image>` stands for one."""
        prompt = self.prompt(messages, chat_template_kwargs={"enable_thinking": False})
        coded = {"prompt_string": prompt, "multimodal_data": [base64.b64encode(data).decode() for data in pictures]}
        found = self.ask(
            "/completion", prompt=coded, n_predict=count, n_probs=top, temperature=-1, ignore_eos=True,
            cache_prompt=False, return_tokens=True,
        )  # fmt: skip
        first = {token["id"]: token["logprob"] for token in found["completion_probabilities"][0]["top_logprobs"]}
        prompt = prompt.replace(self.ask("/props")["media_marker"], "<image>")
        return prompt, found["tokens_evaluated"], found["tokens"], first
