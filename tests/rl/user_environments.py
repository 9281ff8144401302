"""Environments of a user."""


class Guess:
    """A number is to be guessed."""

    def start(self, task, seed):
        return {"number": task.fields["answer"], "tries": 0, "seed": seed}

    def step(self, state, turn):
        state["tries"] += 1
        number = turn.text.strip()
        if number == str(state["number"]):
            return None
        return [{"role": "user", "content": f"Not {number}."}]

    def end(self, state):
        state["ended"] = True

    def close(self):
        pass


class Half:
    """Lacks functions."""

    def start(self, task, seed):
        pass

    def step(self, state, turn):
        pass


class Broken:
    def __init__(self):
        raise OSError("no such service")
