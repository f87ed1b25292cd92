"""Pictures drawn with the adapter: exactly the pipeline's, and the sheet they are shown on."""
