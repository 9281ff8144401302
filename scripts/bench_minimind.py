"""MiniMind's side of the benchmarks: run inside a checkout of jingyaogong/minimind by a Python that has torch,
transformers and datasets. Takes requests as JSON lines on its input and answers each with a JSON line.

    {"train": 3}     three steps of its training loop -> seconds, tokens (all positions), useful (not padding)
    {"greedy 16": 64} its `generate`, 64 new tokens to each of 16 prompts, cases as in bench_requests -> seconds, tokens
    {"full": 64}     its rollout engine, 64 new tokens in each completion of a rollout -> seconds, tokens
    {"agent": 64}    its episodes with tools, of three turns of 64 tokens -> seconds, episodes

The training step is that of trainer/train_pretrain.py without the loop around it: forward with labels, backward, clip,
AdamW, zero_grad. Only `bench_train.py`, `bench_decode.py` and `bench_rollout.py` start this.
"""

import itertools
import json
import os
import sys
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
answers = os.dup(1)
os.dup2(2, 1)  # what MiniMind prints is no answer
sys.path.insert(0, ".")

import torch  # noqa: E402
from bench_requests import CALL, RESULT, agent_messages, requests, rollout  # noqa: E402
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM  # noqa: E402

REQUEST = json.loads(sys.argv[1])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_model():
    torch.manual_seed(0)
    if REQUEST.get("threads"):
        torch.set_num_threads(REQUEST["threads"])
    config = MiniMindConfig(
        hidden_size=REQUEST["hidden_size"], num_hidden_layers=REQUEST["layers"], use_moe=REQUEST["moe"]
    )
    return MiniMindForCausalLM(config).to(DEVICE)


def make_batches():
    """Endless (input_ids, labels): full rows of random tokens, or MiniMind's own datasets on a file."""
    rows, length = REQUEST["rows"], REQUEST["seq_len"]
    if not REQUEST.get("data"):
        ids = torch.randint(3, 6400, (rows, length))
        while True:
            yield ids, ids
    from dataset.lm_dataset import PretrainDataset, SFTDataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("model")
    dataset = {"text": PretrainDataset, "conversation": SFTDataset}[REQUEST["kind"]]
    dataset = dataset(REQUEST["data"], tokenizer, max_length=length)
    while True:
        order = torch.randperm(len(dataset)).tolist()
        yield from torch.utils.data.DataLoader(dataset, batch_size=rows, sampler=order, drop_last=True)


def make_train():
    model = make_model()
    if REQUEST.get("compile"):
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    batches = make_batches()
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")

    def train(steps):
        started, tokens, useful = time.perf_counter(), 0, 0
        for _ in range(steps):
            batch = next(batches)
            useful += int((batch[0] != 0).sum())  # 0 is MiniMind's padding; counted here, for a GPU would be waited for
            tokens += batch[0].numel()
            input_ids, labels = (array.to(DEVICE) for array in batch)
            with autocast:
                result = model(input_ids, labels=labels)
                loss = result.loss + result.aux_loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - started, "tokens": tokens, "useful": useful}

    return train


def make_generate():
    model = make_model().eval()
    model = model.half() if DEVICE == "cuda" else model  # as its eval_llm.py does
    calls = itertools.count()

    def generate(case, count):
        """The requests of `bench_decode.requests` as one batch, padded on the left; it ends with the longest answer."""
        asked, sampling = requests(REQUEST, case, count, next(calls))
        longest, new_tokens = (
            max(column) for column in zip(*((len(prompt), new) for prompt, new in asked), strict=True)
        )
        prompts, mask = torch.zeros((2, len(asked), longest), dtype=torch.long)
        for row, (prompt, _) in enumerate(asked):
            prompts[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = torch.tensor(prompt), 1
        greedy = {"do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        started = time.perf_counter()
        out = model.generate(
            inputs=prompts.to(DEVICE), attention_mask=mask.to(DEVICE), max_new_tokens=new_tokens, eos_token_id=None,
            **(sampling if sampling["temperature"] else greedy),
        )  # fmt: skip
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        assert out.shape[1] == longest + new_tokens
        return {"seconds": time.perf_counter() - started, "tokens": sum(new for _, new in asked)}

    return generate


def make_rollout():
    """Its rollout engine, on the requests of `bench_requests.rollout` as one batch."""
    from trainer.rollout_engine import TorchRolloutEngine
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.eos_token_id = None  # to the full length
    autocast = torch.autocast("cuda", torch.bfloat16) if DEVICE == "cuda" else None
    engine, calls = TorchRolloutEngine(make_model().eval(), tokenizer, DEVICE, autocast), itertools.count()

    def write(case, count):
        prompts, lengths = rollout(REQUEST, case, count, next(calls))
        prompts = torch.tensor(prompts, device=DEVICE)
        started = time.perf_counter()
        result = engine.rollout(prompts, torch.ones_like(prompts), REQUEST["completions"], max(lengths))
        assert result.per_token_logps.cpu().shape == (len(lengths), max(lengths))
        return {"seconds": time.perf_counter() - started, "tokens": sum(lengths)}

    return write


def make_agent():
    """Episodes of three turns by its `rollout_single`, one by one as its training plays them; each turn is taken for
    the same call, whatever a random model wrote."""
    from trainer import train_agent
    from trainer.rollout_engine import TorchRolloutEngine
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("model")
    engine, numbers = TorchRolloutEngine(make_model().eval(), tokenizer, DEVICE), itertools.count()
    engine.tokenizer = AutoTokenizer.from_pretrained("model")
    engine.tokenizer.eos_token_id = None  # to the full length
    train_agent.parse_tool_calls = lambda text: [CALL]
    train_agent.execute_tool = lambda name, arguments: json.loads(RESULT)

    def play(count):
        started, episodes = time.perf_counter(), REQUEST["singly"]
        for _ in range(episodes):
            messages, tools = agent_messages(next(numbers))
            played = train_agent.rollout_single(
                engine, tokenizer, messages, tools, max_new_tokens=count, thinking_ratio=0.0, device=DEVICE
            )
            assert len(played[6]) == 3
        return {"seconds": time.perf_counter() - started, "episodes": episodes}

    return play


MAKERS = {"train": make_train, "rollout": make_rollout, "agent": make_agent, "generate": make_generate}
KINDS, made = {"train": "train", "full": "rollout", "unequal": "rollout", "agent": "agent"}, {}
for line in sys.stdin:
    ((name, count),) = json.loads(line).items()
    kind = KINDS.get(name, "generate")
    if kind not in made:
        made[kind] = MAKERS[kind]()
    result = made[kind](count) if kind in ("train", "agent") else made[kind](name, count)
    os.write(answers, (json.dumps(result) + "\n").encode())
