"""A reference trainer for sparse mixture-of-experts language models, one idea a file; run it as `sigma train`."""
