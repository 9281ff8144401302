"""`minimind demo`: its text and its story."""
