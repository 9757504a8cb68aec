"""What both methods stand on: models, conversion, decoding, training, data."""
