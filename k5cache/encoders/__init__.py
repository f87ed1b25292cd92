"""The three encoders, each loaded alone and freed before the next. The only place that names ``transformers``."""
