"""In which dtype parameters are kept where they are only read."""

from typing import Any

import jax

Params = dict[str, Any]


def cast_matrices(params: Params, dtype: Any) -> Params:
    """The same parameters with their kernels and embeddings in `dtype`, so that no step reads and casts more; norms and
    routers stay as they are."""

    def cast(path, leaf):
        names = [key.key for key in path]
        is_matrix = names[-1] in ("kernel", "embedding") and "router" not in names
        return leaf.astype(dtype, copy=False) if is_matrix else leaf

    return jax.tree_util.tree_map_with_path(cast, params)
