"""One file for each metric, as `evaluate.load` wants it; see `sparseq.metrics.load`."""
