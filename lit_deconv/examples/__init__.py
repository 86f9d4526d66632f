"""Generated pictures and the models trained on them."""
