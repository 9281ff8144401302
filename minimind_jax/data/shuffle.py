"""The order of an epoch's rows: grain's shuffle, of all rows at once.

Grain permutes one place at a time with a cipher of at least 16 bits, walking on where it leaves the range: of 1,000
rows each takes 65 steps of the cipher. Here the cipher is a table, and walking on is reading it again.
"""

import numpy as np

ROUNDS = 4


def shuffled(count: int, seed: int) -> np.ndarray:
    """uint32 (count,): `grain.experimental.index_shuffle` of the places 0 to count - 1, with that seed of 32 bits."""
    last = count - 1
    bits = max(16, int(np.ceil(np.log2(max(last, 1)))))
    table = _encrypt(np.arange(2 ** (bits + bits % 2), dtype=np.uint32), (bits + 1) // 2, _keys(seed))
    while (table[:count] > last).any():
        table = np.where(table > last, table[table], table)  # twice as many steps each time
    return table[np.arange(count) % len(table)] if last else np.zeros(1, np.uint32)


def _encrypt(values: np.ndarray, width: int, keys: list[int]) -> np.ndarray:
    """The Simon block cipher (eprint.iacr.org/2013/404) on two words of `width` bits."""
    mask = np.uint32(2**width - 1)

    def rotated(word: np.ndarray, by: int) -> np.ndarray:
        return (word << np.uint32(by) | word >> np.uint32(width - by)) & mask

    def mixed(word: np.ndarray, key: int) -> np.ndarray:
        return (rotated(word, 1) & rotated(word, 8)) ^ rotated(word, 2) ^ (np.uint32(key) & mask)

    left, right = values >> np.uint32(width), values & mask
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        left = left ^ mixed(right, first)
        right = right ^ mixed(left, second)
    return left << np.uint32(width) | right


def _keys(seed: int) -> list[int]:
    """What C++'s std::seed_seq makes of one number, a key a round."""
    state, whole = [0x8B8B8B8B] * ROUNDS, 2**32

    def stirred(value: int) -> int:
        return value ^ value >> 27

    for k in range(2 * ROUNDS):
        here, after, further = k % ROUNDS, (k + 1) % ROUNDS, (k + 2) % ROUNDS
        if k < ROUNDS:
            added = 1664525 * stirred(state[here] ^ state[after] ^ state[k - 1]) % whole
            value = (added + (1 if k == 0 else here + seed if k == 1 else here)) % whole
            state[after], state[further] = (state[after] + added) % whole, (state[further] + value) % whole
        else:
            added = 1566083941 * stirred((state[here] + state[after] + state[here - 1]) % whole) % whole
            value = (added - here) % whole
            state[after], state[further] = state[after] ^ added, state[further] ^ value
        state[here] = value
    return state
