"""What a run needs, before renting: its real step, compiled for a named GPU or TPU that need not be there."""
