"""The network, pure: arrays in, arrays out; no files, no tokenizer.

Array names carry their shape. The letters, used by every module and every einsum:

    B batch    T time (tokens of a row)    S slots of a key/value cache
    D model width    N query heads    K key/value heads    H width of one head    G query heads per key/value head
    F feed-forward width    V vocabulary    L layers    E experts
"""
