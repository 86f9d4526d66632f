"""Random networks, each written as users write it and by the deconvnet's definition."""
