"""`minimind data cache`: the caches of tokens and features on this machine, and removing them."""

import time

from rich.filesize import decimal

from minimind_jax.config.sections import FilesConfig
from minimind_jax.config.tools import CacheConfig
from minimind_jax.data.cache_folder import StoredCache, cache_root, is_in_use, remove_cache, stored_caches
from minimind_jax.texts import listed

SHOWN_FILES = 3
DAY = 24 * 60 * 60


def run(config: CacheConfig) -> list[StoredCache]:
    """Lists or removes the caches that `config` means; none is removed that a process has open.

    Returns what is left, or was listed. Raises UserError for a cache that cannot be removed.
    """
    root = cache_root(FilesConfig(cache_dir=config.cache_dir))
    asked = [cache for cache in stored_caches(root) if time.time() - cache.last_used >= config.days * DAY]
    if config.clear:
        unwanted = [cache for cache in asked if cache.stale or config.clear == "all"]
        removed = [cache for cache in unwanted if remove_cache(cache)]
        kept = [cache for cache in unwanted if cache not in removed]
        print(f"removed {_amount(removed)}" + (f"; kept {_amount(kept)}, in use" if kept else ""))
        return stored_caches(root)
    print(f"{root}: {_amount(asked)}")
    for cache in asked:
        print(_line(cache))
        if cache.files:
            print(f"          {listed(cache.files, SHOWN_FILES)}")
    return asked


def _line(cache: StoredCache) -> str:
    age = int((time.time() - cache.last_used) / DAY)
    used = "used today" if age < 1 else f"used {age:,} day{'s' * (age > 1)} ago"
    state = "in use" if is_in_use(cache) else "stale" if cache.stale else ""
    return f"{cache.key[:8]}  {cache.kind:<12}  {decimal(cache.size):>9}  {used}  {state}".rstrip()


def _amount(caches: list[StoredCache]) -> str:
    noun = "cache" if len(caches) == 1 else "caches"
    return f"{len(caches):,} {noun}, {decimal(sum(cache.size for cache in caches))}"
