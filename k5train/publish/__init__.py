"""How does a run's LoRA get to the hub, and what does its page say?"""
