"""Learning from reward: the policy writes, what it wrote is rewarded, and becomes batches of the one loop."""
