"""A real, tiny reinforcement-learning trajectory and what it takes to judge its checkpoints."""
