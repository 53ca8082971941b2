"""Which neurons of a language model belong to which language (arXiv 2505.21505; LAPE: arXiv 2402.16438)."""
