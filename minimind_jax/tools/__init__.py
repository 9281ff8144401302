"""Tools that a model may call: a few of our own and the user's functions, in processes that end when they hang."""
