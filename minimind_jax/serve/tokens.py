"""/tokenize, /detokenize and /apply-template: a prompt as the model sees it."""

from minimind_jax.data.documents import begun
from minimind_jax.serve.errors import refused
from minimind_jax.serve.models import Served
from minimind_jax.serve.prompts import prompt_ids, prompt_text, read_talk, thinks
from minimind_jax.serve.protocol import DetokenizeRequest, Json, TemplateRequest, TokenizeRequest


def tokenize(body: TokenizeRequest, served: Served, thinking: bool) -> Json:
    tokenizer = served.tokenizer
    given = [name for name in ("prompt", "content", "messages") if getattr(body, name) is not None]
    if len(given) != 1:
        raise refused(f"expected one of prompt, content and messages; there are {', '.join(given) or 'none'}", "prompt")
    if body.messages is None:
        ids = tokenizer.encode(getattr(body, given[0]))
        ids = begun(tokenizer, ids) if body.add_special_tokens else ids
    else:
        talk = read_talk(served, body.messages, body.tools, thinks(body, thinking))
        ends = body.add_generation_prompt is False
        ids = tokenizer.encode(prompt_text(tokenizer, talk, False)) if ends else prompt_ids(tokenizer, talk)
    found = {"count": len(ids), "max_model_len": served.context, "tokens": ids}
    if body.return_token_strs:
        found["token_strs"] = [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
    return found


def detokenize(body: DetokenizeRequest, served: Served) -> Json:
    if outside := [i for i in body.tokens if i >= served.vocabulary]:
        raise refused(f"tokens: {outside[0]} is none of the ids 0 to {served.vocabulary - 1}", "tokens")
    text = served.tokenizer.decode([i for i in body.tokens if i < served.tokenizer.vocab_size], False)
    return {"prompt": text, "content": text}


def apply_template(body: TemplateRequest, served: Served, thinking: bool) -> Json:
    talk = read_talk(served, body.messages, body.tools, thinks(body, thinking))
    return {"prompt": prompt_text(served.tokenizer, talk, body.add_generation_prompt is not False)}
