"""Where images, captions and masks come from, and how their pixels are read. No model is loaded here."""
