"""Using a trained model: loading it, reading with it, and streaming text from it."""
