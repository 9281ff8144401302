"""Parts of other libraries that these call private, where there is no public way to the same: each is taken here, so
that one that has moved is told by its name."""

import importlib
import operator
from importlib.metadata import version
from types import ModuleType

from minimind_jax.errors import UserError

TRIED = {"jax": "0.10.2 to 0.12.0.1", "tokamax": "0.0.17"}  # releases that had all that is asked for


def private_module(path: str, *names: str) -> ModuleType:
    """The module, which has these names (`a` or `a.b`). Raises UserError where it has not."""
    library = path.partition(".")[0]
    try:
        found = importlib.import_module(path)
        for name in names:
            operator.attrgetter(name)(found)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{library} {version(library)} has no longer what this needs of its insides, {path} with "
            f"{', '.join(names)} ({error}); install a release of {library} that has, such as {TRIED[library]}"
        ) from error
    return found
