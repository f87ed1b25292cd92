"""Is a LoRA as good if it is trained on ``int8-dynamic`` as on ``int8-quanto``? A trial on k5-micro.

The rule by which the trial decides is in ``verdict.py``.
"""
