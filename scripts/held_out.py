"""The measure that recipe.py and bench_target.py share, the same for every way of training: bits per byte of held-out
text cut into windows.

    python scripts/held_out.py MODEL FILE [--records 600] [--window 338]

The text of each record is cut into windows of `window` tokens, each predicted behind a start token. The sum of the
negative log-likelihoods in bits is divided by the UTF-8 bytes of the text, so models with other tokenizers compare.
MODEL is a Hugging Face folder or a run.
"""

import argparse
import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.folders import resolve_model_folder
from minimind_jax.inference.load import load_model
from minimind_jax.losses.vocabulary import token_scores

ROWS = 16


def bits_per_byte(model: str, file: str | Path, records: int = 600, window: int = 338) -> float:
    folder = resolve_model_folder(model)
    tokenizer = Tokenizer.load(folder)
    network, params = load_model(folder, "float32")
    with open(file, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in itertools.islice(lines, records)]
    windows, byte_count = [], 0
    for text in texts:
        byte_count += len(text.encode())
        ids = tokenizer.encode(text)
        windows += [ids[start : start + window] for start in range(0, len(ids), window)]

    @jax.jit
    def nll(params, tokens_BT, targets_BT, weights_BT):
        hidden_BTD = network.read_rows(params, network.embed(params, tokens_BT)).hidden_BTD
        scores = token_scores(hidden_BTD, network.head_kernel(params), targets_BT, network.platform)
        return -jnp.sum(scores.log_probs_BT * weights_BT)

    total = 0.0
    for start in range(0, len(windows), ROWS):
        tokens, targets, weights = (np.zeros((ROWS, window), dtype) for dtype in (np.int32, np.int32, np.float32))
        for row, ids in enumerate(windows[start : start + ROWS]):
            tokens[row, : len(ids)] = [tokenizer.bos_id, *ids[:-1]]
            targets[row, : len(ids)], weights[row, : len(ids)] = ids, 1
        total += float(nll(params, tokens, targets, weights))
    return total / math.log(2) / byte_count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("file")
    parser.add_argument("--records", type=int, default=600)
    parser.add_argument("--window", type=int, default=338)
    args = parser.parse_args()
    print(json.dumps({"model": args.model, "bits per byte": round(bits_per_byte(**vars(args)), 4)}))


if __name__ == "__main__":
    main()
