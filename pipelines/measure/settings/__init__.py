"""Which settings for what? LoRAs of three concepts, trained with one option changed at a time, judged by two numbers.

    python -m pipelines.measure.settings --workers 16 -o settings.json

Each LoRA is judged by the loss on pictures of its concept that nothing was trained on, and by the loss on the base's
own styles, both over the base's: what it learned, and what it made the base forget. docs/settings.md has the tables.
"""
